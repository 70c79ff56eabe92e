"""Negative log likelihood of a batch, for the training loss and for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.nn.arguments import type_name
from osdn_jax.nn.chunked_loss import DEFAULT_CHUNKS, Chunks, cross_entropy
from osdn_jax.nn.parallel import cross_entropy_over_mesh
from osdn_jax.nn.sharding import ambient_mesh
from osdn_jax.nn.split import Parameters

_BATCH = ("inputs", "targets", "segment_ids", "weights")


class LikelihoodSums(NamedTuple):
    """Weighted sums over the targets of a batch, float32.

    Attributes:
        nats: sum of negative log likelihoods; divided by `targets` it is the mean loss.
        squared_normalizers: sum of logsumexp(logits)^2, for a z-loss.
        targets: sum of the weights.
        balance: load-balancing loss, the mean over the model's mixtures and all tokens, if it was asked for, else 0. It
            is no sum.
    """

    nats: Float[Array, ""]
    squared_normalizers: Float[Array, ""]
    targets: Float[Array, ""]
    balance: Float[Array, ""]


def likelihood_sums(
    apply: Callable[..., Any],
    parameters: Parameters,
    batch: Mapping[str, Any],
    *,
    chunks: Chunks = DEFAULT_CHUNKS,
    dropout_key: jax.Array | None = None,
    balance: bool = False,
) -> LikelihoodSums:
    """Return the summed negative log likelihood of a batch and its weights, without forming all logits at once.

    The example of `CausalLM` has a training step with it.

    Args:
        apply: (parameters, ...) -> ..., as `nn.split_model` returns it for a model with the methods `features` and
            `unembedding`.
        parameters: the model's parameters.
        batch: arrays [B, T] by name. inputs: tokens. targets: the tokens after them; with weight 0, any integers.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes. weights: of
            the targets, floats. Optional: positions, [B, N] integers: targets and weights are [B, N] and belong to
            these tokens of each row, and no other token has logits.
        chunks: sizes of the logits that exist at a time, as in `nn.cross_entropy`.
        dropout_key: random key of the model's dropout. Default: None, no dropout.
        balance: compute the load-balancing loss of the model's mixtures, by its method `balanced_features`. Default:
            False.

    Raises:
        ValueError: batch lacks an array, targets or weights have another shape than inputs (or positions), or there are
            positions over a mesh.
        TypeError: batch is not a mapping.
    """
    _check_batch(batch)
    method = "balanced_features" if balance else "features"
    hidden, _, *balances = apply(
        parameters, batch["inputs"], segment_ids=batch["segment_ids"], dropout_key=dropout_key, method=method
    )
    if "positions" in batch:
        hidden = hidden_at(hidden, jnp.asarray(batch["positions"]))
    unembedding, targets = apply(parameters, method="unembedding"), jnp.asarray(batch["targets"])
    loss = cross_entropy if ambient_mesh() is None else cross_entropy_over_mesh
    nats, normalizers = loss(hidden, unembedding, targets, chunks)
    weights = jnp.asarray(batch["weights"])

    def weighted(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(weights == 0, 0.0, x) * weights)

    found = balances[0] if balances else jnp.zeros((), jnp.float32)
    return LikelihoodSums(weighted(nats), weighted(jnp.square(normalizers)), jnp.sum(weights), found)


def hidden_at(hidden: Float[Array, "B T D"], positions: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """Return the rows of `hidden` at the given positions of each sequence."""
    return jnp.take_along_axis(hidden, positions[..., None], axis=1)


def _check_batch(batch: Mapping[str, Any]) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch: got {type_name(batch)}, expected a dict with the keys {', '.join(_BATCH)}")
    if not set(_BATCH) <= set(batch):
        given = ", ".join(map(str, batch)) or "none"
        raise ValueError(f"batch: got the keys {given}, expected {', '.join(_BATCH)}")
    like = "positions" if "positions" in batch else "inputs"
    if like == "positions" and ambient_mesh() is not None:
        raise ValueError("batch: got positions over a mesh, expected targets and weights of all tokens")
    shape = np.shape(batch[like])
    for name in ("targets", "weights"):
        if np.shape(batch[name]) != shape:
            raise ValueError(f"batch: got {name} of shape {np.shape(batch[name])}, expected {shape} like the {like}")
