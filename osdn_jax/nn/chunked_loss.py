"""Cross-entropy over a large vocabulary, computed in chunks so that the full logits never exist."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.nn.sharding import with_auto_axes
from osdn_jax.ops import checks, sequence_parallel


class Chunks(NamedTuple):
    """Size of the logits that exist at a time, [B, sequence, vocabulary].

    Attributes:
        sequence: tokens of each row. Default: 512.
        vocabulary: vocabulary entries. Default: 8192.
    """

    sequence: int = 512
    vocabulary: int = 8192


DEFAULT_CHUNKS = Chunks()


def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "Vocab D"],
    targets: Int[Array, "B T"],
    chunks: Chunks = DEFAULT_CHUNKS,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return the negative log likelihood and the log normaliser of each target, for logits hidden @ unembedding.T.

    The logits are computed chunk by chunk, and recomputed in the backward pass. Matrix products are in the dtype of
    `hidden` and accumulate in float32, the dtype of everything else. A chunk holds every n-th token and every n-th
    vocabulary entry, so that an axis that is sharded over devices stays where it is.

    Args:
        hidden: [B, T, D], the inputs of the head.
        unembedding: [vocabulary, D], a row for each vocabulary entry.
        targets: [B, T] integers; a target outside the vocabulary has NaN nats.
        chunks: sizes of the chunks; sizes that they do not divide are padded.

    Returns:
        (nats, normalizers), both [B, T] float32: -log softmax(logits)[target], and logsumexp(logits), for a z-loss.

    Raises:
        ValueError: a chunk size is below 1, or a shape does not match hidden.
        TypeError: targets are not integers.

    Example:
        >>> hidden, unembedding = jnp.ones((1, 3, 4)), jnp.zeros((8, 4))
        >>> nats, _ = cross_entropy(hidden, unembedding, jnp.zeros((1, 3), jnp.int32))
        >>> [f"{x:.3f}" for x in nats[0]]  # log 8
        ['2.079', '2.079', '2.079']
    """
    hidden = checks.floating_array("hidden", hidden, 3, "[B, T, D]")
    unembedding = checks.floating_array("unembedding", unembedding, 2, "[vocabulary, D]")
    if unembedding.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"unembedding: got shape {unembedding.shape}, expected [vocabulary, D] with D = {hidden.shape[2]} of hidden"
        )
    targets = checks.indices("targets", targets, hidden.shape[:2], "[B, T]", unembedding.shape[0])
    for name, size in chunks._asdict().items():
        if size < 1:
            raise ValueError(f"chunks.{name}: got {size}, expected at least 1")
    return with_auto_axes(functools.partial(_jitted, chunks), hidden, unembedding, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cross_entropy(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunks: Chunks
) -> tuple[jax.Array, jax.Array]:
    vocabulary, wide = unembedding.shape[0], _accumulator(hidden)
    x, labels = _to_chunks(hidden, chunks.sequence, 1), _to_chunks(targets, chunks.sequence, 1)
    entries = _to_chunks(unembedding, chunks.vocabulary, 0)
    axes = sequence_parallel.axes_of((hidden, unembedding, targets))  # of an enclosing jax.shard_map

    def of_tokens(_: None, i: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_i, labels_i = _chunk(x, i, 1), _chunk(labels, i, 1)

        def of_entries(carry: tuple[jax.Array, ...], j: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            peak, total, wanted = carry
            logits, is_target = _logits(x_i, labels_i, entries, j, vocabulary)
            higher = jnp.maximum(peak, jnp.max(logits, axis=-1))
            total = total * jnp.exp(peak - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
            found = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
            return (higher, total, jnp.where(jnp.any(is_target, axis=-1), found, wanted)), None

        start = tuple(jnp.full(labels_i.shape, value, wide) for value in (-jnp.inf, 0.0, jnp.nan))
        start = sequence_parallel.vary(start, axes)
        (peak, total, wanted), _ = jax.lax.scan(of_entries, start, jnp.arange(entries.shape[1], dtype=jnp.int32))
        normalizer = peak + jnp.log(total)
        return None, (normalizer - wanted, normalizer)

    _, (nats, normalizer) = jax.lax.scan(of_tokens, None, jnp.arange(x.shape[2], dtype=jnp.int32))
    return _from_chunks(nats, hidden.shape[1]), _from_chunks(normalizer, hidden.shape[1])


type _Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunks: Chunks
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    nats, normalizer = _cross_entropy(hidden, unembedding, targets, chunks)
    return (nats, normalizer), (hidden, unembedding, targets, normalizer)


def _backward(
    chunks: Chunks, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    hidden, unembedding, targets, normalizer = residuals
    vocabulary, wide = unembedding.shape[0], _accumulator(hidden)
    entries = _to_chunks(unembedding, chunks.vocabulary, 0)
    # d logits = probability * (d nats + d normalizer) - one_hot(target) * d nats
    by_token = (hidden, targets, normalizer, cotangents[0], cotangents[0] + cotangents[1])
    token_chunks = tuple(_to_chunks(y, chunks.sequence, 1) for y in by_token)
    axes = sequence_parallel.axes_of((by_token, entries))

    def of_tokens(d_entries: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_i, labels_i, normalizer_i, d_nats, d_both = (_chunk(y, i, 1) for y in token_chunks)

        def of_entries(carry: tuple[jax.Array, jax.Array], j: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            d_x, d_entries = carry
            logits, is_target = _logits(x_i, labels_i, entries, j, vocabulary)
            d_logits = jnp.exp(logits - normalizer_i[..., None]) * d_both[..., None]
            d_logits = (d_logits - jnp.where(is_target, d_nats[..., None], 0.0)).astype(x_i.dtype)
            entries_j = _chunk(entries, j, 0).astype(x_i.dtype)
            d_x += jnp.einsum("btv,vd->btd", d_logits, entries_j, preferred_element_type=wide)
            d_entries_j = jnp.einsum("btv,btd->vd", d_logits, x_i, preferred_element_type=wide)
            d_entries = jax.lax.dynamic_update_index_in_dim(d_entries, _chunk(d_entries, j, 0) + d_entries_j, j, 1)
            return (d_x, d_entries), None

        start = (sequence_parallel.vary(jnp.zeros(x_i.shape, wide), axes), d_entries)
        (d_x, d_entries), _ = jax.lax.scan(of_entries, start, jnp.arange(entries.shape[1], dtype=jnp.int32))
        return d_entries, d_x.astype(x_i.dtype)

    zero = sequence_parallel.vary(jnp.zeros(entries.shape, wide), axes)
    d_entries, d_hidden = jax.lax.scan(of_tokens, zero, jnp.arange(token_chunks[0].shape[2], dtype=jnp.int32))
    # XLA would fuse a transpose that follows into the products, which it cannot run in 16 bits on a CPU.
    d_entries = jax.lax.optimization_barrier(d_entries)
    d_unembedding = d_entries.reshape(-1, d_entries.shape[-1])[:vocabulary].astype(unembedding.dtype)
    return _from_chunks(d_hidden, hidden.shape[1]), d_unembedding, None


_cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(
    chunks: Chunks, hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compile once for calls with equal shapes, also outside jit."""
    return _cross_entropy(hidden, unembedding, targets, chunks)


def _logits(
    x: jax.Array, labels: jax.Array, entries: jax.Array, j: jax.Array, vocabulary: int
) -> tuple[jax.Array, jax.Array]:
    """Return the logits [B, t, v] of chunk j of the vocabulary, -inf for padding, and a mask of those of the labels."""
    index = jnp.arange(entries.shape[0], dtype=jnp.int32) * entries.shape[1] + j
    exists = (index < vocabulary)[None, None]
    entries_j = _chunk(entries, j, 0).astype(x.dtype)
    logits = jnp.einsum("btd,vd->btv", x, entries_j, preferred_element_type=_accumulator(x))
    return jnp.where(exists, logits, -jnp.inf), (index[None, None] == labels[..., None]) & exists


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _to_chunks(x: jax.Array, largest: int, axis: int) -> jax.Array:
    """Split an axis into [size, count], size at most `largest`: chunk i holds i, i + count, i + 2 count, ..."""
    length = x.shape[axis]
    count = max(1, -(-length // largest))
    size = -(-length // count)
    padding = [(0, size * count - length if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding).reshape(*x.shape[:axis], size, count, *x.shape[axis + 1 :])


def _chunk(x: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """Return chunk i of an axis split by `_to_chunks`."""
    return jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)


def _from_chunks(x: jax.Array, length: int) -> jax.Array:
    """Join [count, B, size, ...] to [B, length, ...], the inverse of `_to_chunks`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]
