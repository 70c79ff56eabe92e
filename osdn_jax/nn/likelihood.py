"""Negative log likelihood of a batch: the sums that training and evaluation are made of."""

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
    """Weighted sums over the targets of a batch, float32."""

    nats: Float[Array, ""]  # of negative log likelihoods
    squared_normalizers: Float[Array, ""]  # of logsumexp(logits)^2
    targets: Float[Array, ""]  # of the weights


def likelihood_sums(
    apply: Callable[..., Any],
    parameters: Parameters,
    batch: Mapping[str, Any],
    *,
    chunks: Chunks = DEFAULT_CHUNKS,
    dropout_key: jax.Array | None = None,
) -> LikelihoodSums:
    """The sums of a batch, without its logits in memory. A target of weight 0 may be any number.

    Args:
        apply: of `nn.split_model`, of a model with the methods `features` and `unembedding`.
        parameters: of the model.
        batch: inputs, targets, segment_ids and weights, [B, T] each.
        chunks: as of `nn.cross_entropy`.
        dropout_key: random key of the model's dropout; None for none.
    """
    hidden, _ = apply(
        parameters, batch["inputs"], segment_ids=batch["segment_ids"], dropout_key=dropout_key, method="features"
    )
    unembedding, targets = apply(parameters, method="unembedding"), jnp.asarray(batch["targets"])
    of_tokens = cross_entropy if ambient_mesh() is None else cross_entropy_over_mesh
    nats, normalizers = of_tokens(hidden, unembedding, targets, chunks)
    weights = jnp.asarray(batch["weights"])

    def weighted(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights == 0, 0.0, x) * weights)

    return LikelihoodSums(weighted(nats), weighted(jnp.square(normalizers)), jnp.sum(weights))
