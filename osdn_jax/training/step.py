"""The training step, a pure function of its state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osdn_jax.data import Window
from osdn_jax.evaluation.likelihood import weighted_nats
from osdn_jax.nn.functional import Parameters


class TrainState(NamedTuple):
    """All that a step changes; every leaf is an array, so that a checkpoint holds it whole."""

    params: Parameters
    optimizer: optax.OptState
    step: jax.Array  # int32, how many steps are done
    random: jax.Array  # key data, uint32

    @classmethod
    def create(cls, params: Parameters, optimizer: optax.GradientTransformation, random: jax.Array) -> "TrainState":
        """The state before the first step."""
        return cls(params, optimizer.init(params), jnp.zeros((), jnp.int32), random)


def make_train_step(
    apply: Callable[..., Any], optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Window], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step (state, batch) -> (state, metrics); the old state's memory is reused.

    Metrics are float32 scalars: loss (nats per target token), gradient_norm (before clipping) and update_norm.
    """

    def step(state: TrainState, batch: Window) -> tuple[TrainState, dict[str, jax.Array]]:
        key, dropout_key = jax.random.split(jax.random.wrap_key_data(state.random))

        def loss_of(params: Parameters) -> jax.Array:
            logits, _ = apply(params, batch["inputs"], segment_ids=batch["segment_ids"], dropout_key=dropout_key)
            nats, targets = weighted_nats(logits, batch)
            return nats / jnp.maximum(targets, 1.0)

        loss, gradient = jax.value_and_grad(loss_of)(state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts and floats
            update, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, update)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "update_norm": optax.tree.norm(update),
        }
        return TrainState(params, optimizer_state, state.step + 1, jax.random.key_data(key)), metrics

    return jax.jit(step, donate_argnums=0)
