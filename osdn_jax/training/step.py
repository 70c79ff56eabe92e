"""The training step: a pure function of a state and a batch."""

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
    """Settings of a training step that are not the optimiser's."""

    accumulate: int = 1  # number of micro-batches
    chunks: Chunks = DEFAULT_CHUNKS  # tokens and vocabulary entries per block of logits
    z_loss: float = 0.0  # coefficient of the mean of logsumexp(logits)^2 (arXiv 2204.02311)
    balance: float = 0.0  # coefficient of the load-balancing loss of mixtures of experts (arXiv 2101.03961)
    ema: float = 0.0  # decay of the moving average of the parameters; 0: none


class TrainState(NamedTuple):
    """Everything that a step changes; every leaf is an array, so that a checkpoint holds all of it."""

    params: Parameters
    optimizer: optax.OptState
    step: jax.Array  # int32, number of steps done, including skipped ones
    random: jax.Array  # key data, uint32
    skipped: jax.Array  # int32, number of skipped steps (of non-finite loss, gradient or update)
    skipped_in_a_row: jax.Array  # int32, number of consecutive skipped steps
    ema: Parameters | None  # moving average of the parameters, if there is one

    @classmethod
    def create(
        cls, params: Parameters, optimizer: optax.GradientTransformation, random: jax.Array, *, ema: bool = False
    ) -> "TrainState":
        """Return the state before the first step.

        Args:
            params: the initial parameters, which are not copied.
            optimizer: of `build_optimizer`.
            random: key data, uint32.
            ema: True adds a moving average, which starts from the parameters.
        """
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # separate: each is donated
        average = jax.tree.map(jnp.copy, params) if ema else None
        return cls(params, optimizer.init(params), step, random, skipped, in_a_row, average)

    @property
    def evaluated(self) -> Parameters:
        """The parameters to validate: the moving average if there is one."""
        return self.params if self.ema is None else self.ema


def make_train_step(
    apply: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    config: StepConfig = StepConfig(),
    *,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Window], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the jitted training step.

    A step whose loss, gradient or update is not finite is skipped: it leaves the parameters, the optimiser's state and
    the moving average unchanged.

    Args:
        apply: the model, as `nn.split_model` returns it.
        optimizer: of `build_optimizer`.
        config: settings of the step.
        shardings: of each array of the state, over a mesh; default: one device.

    Returns:
        step(state, batch) -> (state, metrics), which donates the old state. The batch is as in
        `nn.likelihood_sums`. Metrics are scalars: loss (nats per target token), gradient_norm (before clipping),
        update_norm (also of a skipped update) and parameter_norm in float32; skipped_steps and skipped_in_a_row in
        int32; with config.balance also balance, 1 if all experts have equal shares. When it is traced, the step
        raises ValueError for a batch whose rows config.accumulate does not divide.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from osdn_jax import nn
        >>> from osdn_jax.training import TrainState, build_model, default_config, make_train_step
        >>> config = default_config()
        >>> config.model.rule, config.model.layers, config.model.width = "delta_net", 1, 8
        >>> apply, params = nn.split_model(build_model(config))
        >>> optimizer = optax.sgd(0.1)
        >>> step = make_train_step(apply, optimizer)
        >>> state = TrainState.create(params, optimizer, jax.random.key_data(jax.random.key(0)))
        >>> tokens = jnp.arange(8)[None]
        >>> batch = {"inputs": tokens, "targets": tokens + 1}
        >>> batch |= {"segment_ids": jnp.zeros((1, 8), jnp.int32), "weights": jnp.ones((1, 8))}
        >>> state, metrics = step(state, batch)
        >>> int(state.step), metrics["loss"].shape
        (1, ())
    """

    def step(state: TrainState, batch: Window) -> tuple[TrainState, dict[str, jax.Array]]:
        key, dropout_key = jax.random.split(jax.random.wrap_key_data(state.random))
        (loss, balance), gradient = _loss_and_gradient(apply, config, state.params, batch, dropout_key)
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
        if config.balance:
            metrics["balance"] = balance
        return after, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


def _loss_and_gradient(
    apply: Callable[..., Any], config: StepConfig, params: Parameters, batch: Window, dropout_key: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Parameters]:
    """Return (loss of the whole batch in nats per target, balance) and the gradient of all losses, float32."""
    count = config.accumulate
    targets = jnp.maximum(jnp.sum(jnp.asarray(batch["weights"])), 1.0)

    def objective(params: Parameters, rows: Window, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        mixtures = config.balance > 0
        sums = likelihood_sums(apply, params, rows, chunks=config.chunks, dropout_key=key, balance=mixtures)
        balance = sums.balance / count  # the mean over micro-batches
        total = (sums.nats + config.z_loss * sums.squared_normalizers) / targets + config.balance * balance
        return total, (sums.nats / targets, balance)

    gradient_of = jax.grad(objective, has_aux=True)
    if count == 1:
        gradient, losses = gradient_of(params, batch, dropout_key)
        return losses, gradient

    def add(total: Any, index: jax.Array) -> tuple[Any, None]:
        rows = _micro_batch(batch, index, count)
        gradient, losses = gradient_of(params, rows, jax.random.fold_in(dropout_key, index))
        return jax.tree.map(jnp.add, total, (losses, gradient)), None

    zero = ((jnp.zeros((), jnp.float32),) * 2, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, jnp.arange(count))[0]


def _micro_batch(batch: Window, index: jax.Array, count: int) -> Window:
    """Return rows index, index + count, index + 2 count, …; strided, so that every device contributes rows it has.

    Raises ValueError if count does not divide the number of rows.
    """

    def of(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(f"batch: got {x.shape[0]} rows, expected a multiple of accumulate = {count}")
        strided = jnp.asarray(x).reshape(x.shape[0] // count, count, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(strided, index, axis=1, keepdims=False)

    return jax.tree.map(of, batch)
