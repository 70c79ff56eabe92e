"""The training step, a pure function of its state and a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osdn_jax.data import Window
from osdn_jax.nn.chunked_loss import DEFAULT_CHUNKS, Chunks
from osdn_jax.nn.likelihood import likelihood_sums
from osdn_jax.nn.split import Parameters


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a training step does besides the optimiser's."""

    accumulate: int = 1  # parts that the rows of a batch are taken in, one after another
    chunks: Chunks = DEFAULT_CHUNKS  # of the cross-entropy
    z_loss: float = 0.0  # coefficient of the mean of logsumexp(logits)^2 (arXiv 2204.02311)
    ema: float = 0.0  # decay of the moving average of the parameters; 0 for none


class TrainState(NamedTuple):
    """All that a step changes; every leaf is an array, so that a checkpoint holds it whole."""

    params: Parameters
    optimizer: optax.OptState
    step: jax.Array  # int32, how many steps are done, those skipped included
    random: jax.Array  # key data, uint32
    skipped: jax.Array  # int32, how many steps changed nothing, as their numbers were not finite
    skipped_in_a_row: jax.Array  # int32, of these the ones since the last step that was not skipped
    ema: Parameters | None  # moving average of the parameters, if there is one

    @classmethod
    def create(
        cls, params: Parameters, optimizer: optax.GradientTransformation, random: jax.Array, *, ema: bool = False
    ) -> "TrainState":
        """The state before the first step; ema: whether it has a moving average, which starts from the parameters."""
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # each is donated, so each its own
        average = jax.tree.map(jnp.copy, params) if ema else None
        return cls(params, optimizer.init(params), step, random, skipped, in_a_row, average)

    @property
    def evaluated(self) -> Parameters:
        """What to validate: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def make_train_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: StepConfig = StepConfig(),
    *,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Window], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, batch) -> (state, metrics); the old state's memory is reused.

    A step whose loss, gradient or update is not finite leaves parameters, optimiser and moving average as they were.

    Metrics are scalars: loss (nats per target token), gradient_norm (before clipping), update_norm (also of an update
    that was left out) and parameter_norm in float32; skipped_steps and skipped_in_a_row in int32.

    shardings: where each array of the state lies, over a mesh.

    The step raises ValueError, when it is traced, for a batch whose rows config.accumulate does not divide.
    """

    def step(state: TrainState, batch: Window) -> tuple[TrainState, dict[str, jax.Array]]:
        key, dropout_key = jax.random.split(jax.random.wrap_key_data(state.random))
        loss, gradient = _loss_and_gradient(apply, config, state.params, batch, dropout_key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts and floats
            update, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        gradient_norm, update_norm = optax.tree.norm(gradient), optax.tree.norm(update)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & jnp.isfinite(update_norm)
        update = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), update)
        optimizer_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), optimizer_state, state.optimizer)
        params = optax.apply_updates(state.params, update)
        average = state.ema
        if average is not None:
            moved = optax.incremental_update(params, average, 1.0 - config.ema)
            average = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, average)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        after = TrainState(
            params=params,
            optimizer=optimizer_state,
            step=state.step + 1,
            random=jax.random.key_data(key),
            skipped=state.skipped + skipped,
            skipped_in_a_row=(state.skipped_in_a_row + skipped) * skipped,
            ema=average,
        )
        metrics = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "update_norm": update_norm,
            "parameter_norm": optax.tree.norm(params),
            "skipped_steps": after.skipped,
            "skipped_in_a_row": after.skipped_in_a_row,
        }
        return after, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def _loss_and_gradient(
    apply: Callable[..., Any], config: StepConfig, params: Parameters, batch: Window, dropout_key: jax.Array
) -> tuple[jax.Array, Parameters]:
    """Nats per target of the whole batch, and the gradient of that and the z-loss, float32 as the parameters."""
    parts = config.accumulate
    targets = jnp.maximum(jnp.sum(jnp.asarray(batch["weights"])), 1.0)

    def objective(params: Parameters, rows: Window, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        sums = likelihood_sums(apply, params, rows, chunks=config.chunks, dropout_key=key)
        return (sums.nats + config.z_loss * sums.squared_normalizers) / targets, sums.nats / targets

    gradient_of = jax.grad(objective, has_aux=True)
    if parts == 1:
        gradient, loss = gradient_of(params, batch, dropout_key)
        return loss, gradient

    def add(total: tuple[jax.Array, Parameters], part: jax.Array) -> tuple[tuple[jax.Array, Parameters], None]:
        rows = _rows(batch, part, parts)
        gradient, loss = gradient_of(params, rows, jax.random.fold_in(dropout_key, part))
        return jax.tree.map(jnp.add, total, (loss, gradient)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, jnp.arange(parts))[0]


def _rows(batch: Window, part: jax.Array, parts: int) -> Window:
    """Rows part, part + parts, part + 2 parts, ...: of a batch that is split over devices, each gives some of its own.

    Raises ValueError where the parts do not divide the rows.
    """

    def of(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise ValueError(f"batch: got {x.shape[0]} rows, expected a multiple of accumulate = {parts}")
        by_part = jnp.asarray(x).reshape(x.shape[0] // parts, parts, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(by_part, part, axis=1, keepdims=False)

    return jax.tree.map(of, batch)
