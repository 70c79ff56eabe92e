"""How well a model predicts text, in bits per byte."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from osdn_jax.data import Window
from osdn_jax.nn.functional import Parameters


def weighted_nats(logits: Float[Array, "B T Vocab"], batch: Window) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of weighted negative log likelihoods in nats, sum of weights) of a batch's targets."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batch["targets"]))
    weights = jnp.asarray(batch["weights"])
    return jnp.sum(nats * weights), jnp.sum(weights)


def make_evaluate(apply: Callable[..., Any]) -> Callable[[Parameters, Iterable[Window]], float]:
    """The function (parameters, batches) -> bits per target token; one byte is one token here.

    Every window starts with an empty memory, so longer windows are predicted better.
    """

    @jax.jit
    def step(params: Parameters, batch: Window) -> tuple[jax.Array, jax.Array]:
        logits, _ = apply(params, batch["inputs"], segment_ids=batch["segment_ids"])
        return weighted_nats(logits, batch)

    def evaluate(params: Parameters, batches: Iterable[Window]) -> float:
        sums = [step(params, batch) for batch in batches]
        nats, targets = np.sum([[float(a), float(b)] for a, b in sums], axis=0)
        return float(nats / targets / np.log(2.0))

    return evaluate
