"""Cross-entropy over a large vocabulary without the logits of a whole sequence in memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.nn.sharding import with_auto_axes
from osdn_jax.ops import checks, sequence_parallel


class Chunks(NamedTuple):
    """How much of the logits exists at a time: [B, sequence, vocabulary]."""

    sequence: int = 512  # tokens of each row
    vocabulary: int = 8192


DEFAULT_CHUNKS = Chunks()


def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "Vocab D"],
    targets: Int[Array, "B T"],
    chunks: Chunks = DEFAULT_CHUNKS,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(nats, log normaliser) of each target under the logits hidden @ unembedding.T.

    The logits are made chunk by chunk, forward and once more backward. Products are in the type of hidden and
    accumulate in float32, as all else is. A chunk holds every n-th token and every n-th word, so that an axis that is
    split over devices is not moved.

    Args:
        hidden: what the head reads, [B, T, D].
        unembedding: a row for each word of the vocabulary, [vocabulary, D].
        targets: [B, T]; one outside the vocabulary has NaN nats.
        chunks: sizes; whatever they do not divide is padded.

    Returns:
        Both [B, T] in float32: -log softmax(logits)[target], and logsumexp(logits), which the z-loss is made of.

    Raises:
        ValueError: a chunk below 1, or a shape that does not fit hidden.
        TypeError: targets that are no integers.
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
    x, labels = _cut(hidden, chunks.sequence, 1), _cut(targets, chunks.sequence, 1)
    words = _cut(unembedding, chunks.vocabulary, 0)
    axes = sequence_parallel.axes_of((hidden, unembedding, targets))  # of a jax.shard_map around this

    def of_tokens(_: None, i: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        x_i, labels_i = _piece(x, i, 1), _piece(labels, i, 1)

        def of_words(carry: tuple[jax.Array, ...], j: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
            peak, total, wanted = carry
            logits, is_target = _logits(x_i, labels_i, words, j, vocabulary)
            higher = jnp.maximum(peak, jnp.max(logits, axis=-1))
            total = total * jnp.exp(peak - higher) + jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
            found = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
            return (higher, total, jnp.where(jnp.any(is_target, axis=-1), found, wanted)), None

        start = tuple(jnp.full(labels_i.shape, value, wide) for value in (-jnp.inf, 0.0, jnp.nan))
        start = sequence_parallel.vary(start, axes)
        (peak, total, wanted), _ = jax.lax.scan(of_words, start, jnp.arange(words.shape[1], dtype=jnp.int32))
        normalizer = peak + jnp.log(total)
        return None, (normalizer - wanted, normalizer)

    _, (nats, normalizer) = jax.lax.scan(of_tokens, None, jnp.arange(x.shape[2], dtype=jnp.int32))
    return _join(nats, hidden.shape[1]), _join(normalizer, hidden.shape[1])


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
    words = _cut(unembedding, chunks.vocabulary, 0)
    # d logits = probability * (d nats + d normalizer) - one_hot(target) * d nats
    by_token = (hidden, targets, normalizer, cotangents[0], cotangents[0] + cotangents[1])
    pieces = tuple(_cut(y, chunks.sequence, 1) for y in by_token)
    axes = sequence_parallel.axes_of((by_token, words))

    def of_tokens(d_words: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_i, labels_i, normalizer_i, d_nats, d_both = (_piece(y, i, 1) for y in pieces)

        def of_words(carry: tuple[jax.Array, jax.Array], j: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            d_x, d_words = carry
            logits, is_target = _logits(x_i, labels_i, words, j, vocabulary)
            d_logits = jnp.exp(logits - normalizer_i[..., None]) * d_both[..., None]
            d_logits = (d_logits - jnp.where(is_target, d_nats[..., None], 0.0)).astype(x_i.dtype)
            words_j = _piece(words, j, 0).astype(x_i.dtype)
            d_x += jnp.einsum("btv,vd->btd", d_logits, words_j, preferred_element_type=wide)
            d_words_j = jnp.einsum("btv,btd->vd", d_logits, x_i, preferred_element_type=wide)
            d_words = jax.lax.dynamic_update_index_in_dim(d_words, _piece(d_words, j, 0) + d_words_j, j, 1)
            return (d_x, d_words), None

        start = (sequence_parallel.vary(jnp.zeros(x_i.shape, wide), axes), d_words)
        (d_x, d_words), _ = jax.lax.scan(of_words, start, jnp.arange(words.shape[1], dtype=jnp.int32))
        return d_words, d_x.astype(x_i.dtype)

    zero = sequence_parallel.vary(jnp.zeros(words.shape, wide), axes)
    d_words, d_hidden = jax.lax.scan(of_tokens, zero, jnp.arange(pieces[0].shape[2], dtype=jnp.int32))
    # XLA would merge a transpose that follows into the products, which it cannot run on a CPU in 16 bits.
    d_words = jax.lax.optimization_barrier(d_words)
    d_unembedding = d_words.reshape(-1, d_words.shape[-1])[:vocabulary].astype(unembedding.dtype)
    return _join(d_hidden, hidden.shape[1]), d_unembedding, None


_cross_entropy.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=0)
def _jitted(
    chunks: Chunks, hidden: jax.Array, unembedding: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compiles once for equal calls, also where nothing around it is under jit."""
    return _cross_entropy(hidden, unembedding, targets, chunks)


def _logits(
    x: jax.Array, labels: jax.Array, words: jax.Array, j: jax.Array, vocabulary: int
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, t, v] of the words of piece j, -inf for padding, and which of them are those of the labels [B, t]."""
    index = jnp.arange(words.shape[0], dtype=jnp.int32) * words.shape[1] + j
    exists = (index < vocabulary)[None, None]
    words_j = _piece(words, j, 0).astype(x.dtype)
    logits = jnp.einsum("btd,vd->btv", x, words_j, preferred_element_type=_accumulator(x))
    return jnp.where(exists, logits, -jnp.inf), (index[None, None] == labels[..., None]) & exists


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _cut(x: jax.Array, largest: int, axis: int) -> jax.Array:
    """Splits an axis into [size, pieces], size at most `largest`: piece i holds i, i + pieces, i + 2 pieces, ..."""
    length = x.shape[axis]
    pieces = max(1, -(-length // largest))
    size = -(-length // pieces)
    padding = [(0, size * pieces - length if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding).reshape(*x.shape[:axis], size, pieces, *x.shape[axis + 1 :])


def _piece(x: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """Piece i of what `_cut` has cut."""
    return jax.lax.dynamic_index_in_dim(x, i, axis + 1, keepdims=False)


def _join(x: jax.Array, length: int) -> jax.Array:
    """[pieces, B, size, ...] -> [B, length, ...], the reverse of `_cut`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]
