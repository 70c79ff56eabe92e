"""Negative log likelihood of a batch, for the training loss and for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from osdn_jax.nn.chunked_loss import DEFAULT_CHUNKS, Chunks, cross_entropy
from osdn_jax.nn.parallel import cross_entropy_over_mesh
from osdn_jax.nn.sharding import ambient_mesh
from osdn_jax.nn.split import Parameters


class LikelihoodSums(NamedTuple):
    """Weighted sums over the targets of a batch, float32.

    Attributes:
        nats: sum of negative log likelihoods; divided by `targets` it is the mean loss.
        squared_normalizers: sum of logsumexp(logits)^2, for a z-loss.
        targets: sum of the weights.
    """

    nats: Float[Array, ""]
    squared_normalizers: Float[Array, ""]
    targets: Float[Array, ""]


def likelihood_sums(
    apply: Callable[..., Any],
    parameters: Parameters,
    batch: Mapping[str, Any],
    *,
    chunks: Chunks = DEFAULT_CHUNKS,
    dropout_key: jax.Array | None = None,
) -> LikelihoodSums:
    """Return the summed negative log likelihood of a batch and its weights, without forming all logits at once.

    The example of `CausalLM` has a training step with it.

    Args:
        apply: (parameters, ...) -> ..., as `nn.split_model` returns it for a model with the methods `features` and
            `unembedding`.
        parameters: the model's parameters.
        batch: {"inputs": tokens, "targets": the tokens after them, "segment_ids": integers that tell packed documents
            apart, "weights": floats}, [B, T] each. A target with weight 0 may be anything.
        chunks: sizes of the logits that exist at a time, as in `nn.cross_entropy`.
        dropout_key: random key of the model's dropout. Default: None, no dropout.
    """
    hidden, _ = apply(
        parameters, batch["inputs"], segment_ids=batch["segment_ids"], dropout_key=dropout_key, method="features"
    )
    unembedding, targets = apply(parameters, method="unembedding"), jnp.asarray(batch["targets"])
    loss = cross_entropy if ambient_mesh() is None else cross_entropy_over_mesh
    nats, normalizers = loss(hidden, unembedding, targets, chunks)
    weights = jnp.asarray(batch["weights"])

    def weighted(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights == 0, 0.0, x) * weights)

    return LikelihoodSums(weighted(nats), weighted(jnp.square(normalizers)), jnp.sum(weights))
