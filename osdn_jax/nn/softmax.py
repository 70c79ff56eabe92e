"""Softmax attention over keys at given positions, and rotary positions: functions of arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops.containment import contained

_CHUNK = 512  # queries in a chunk, by default


def rotate(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], base: float, size: int | None = None
) -> Float[Array, "B T H K"]:
    """Rotate each pair (x_i, x_{i + K/2}) by the angle position * base^(-2i / K): rotary position embedding.

    The product of a query and a key then depends on the difference of their positions only. The pairs are those of
    Llama's code in Transformers; the paper (arXiv 2104.09864) pairs neighbours. Angles are float32.

    Args:
        x: queries or keys, [B, T, H, K] with even K.
        positions: [B, T] integers, or [1, T] for all rows.
        base: base of the geometric series of frequencies, 10,000 in the paper.
        size: number of channels that are rotated, the first ones of each head, in place of all K. Default: K.
    """
    if size is not None and size < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :size], positions, base), x[..., size:]], axis=-1)
    half, wide = x.shape[-1] // 2, _wide(x.dtype)
    angles = positions.astype(wide)[..., None] * base ** (-jnp.arange(half, dtype=wide) / half)[None, None]
    cosine, sine = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    first: Int[Array, "B T"],
    *,
    first_query: Int[Array, ""] | int | None = None,
    key_positions: Int[Array, " S"] | None = None,
    chunk_size: int | None = None,
    window: int | None = None,
) -> Float[Array, "B T H V"]:
    """Return softmax(q kᵀ / sqrt(K)) v, where query t sees the keys at positions first[t] .. first_query + t.

    Whatever a query does not see does not affect it, NaN included. Chunks of queries are computed one after another,
    and recomputed in the backward pass, so that only [B, H, chunk_size, S] scores exist at a time, or with a window
    [B, H, chunk_size, chunk_size + window - 1]; scores of keys that a query does not see are computed too. Key head h
    serves the query heads h H / Hk to (h + 1) H / Hk - 1. Scores and softmax are float32 (float64 for float64 inputs).
    Gradients exist in reverse mode only.

    Args:
        q: queries.
        k: keys.
        v: values.
        first: [B, T], position of the first key that each query sees.
        first_query: position of the first query's own key. Default: S - T, queries for the last keys.
        key_positions: [S], position of each key. Default: 0 to S - 1.
        chunk_size: number of queries at a time. Default: 512.
        window: the number of keys up to its own that a query sees at most, as `first` says. Only for keys at the
            positions 0 to S - 1. Default: None, any number.
    """
    last = (k.shape[1] - q.shape[1] if first_query is None else first_query) + jnp.arange(q.shape[1], dtype=jnp.int32)
    columns = jnp.arange(k.shape[1], dtype=jnp.int32) if key_positions is None else key_positions
    return _attend((q, k.swapaxes(1, 2), v.swapaxes(1, 2)), first, last, columns, chunk_size or _CHUNK, window)


def attend_cache(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B Hk S K"],
    v: Float[Array, "B Hk S V"],
    first: Int[Array, "B T"],
    *,
    first_query: Int[Array, ""] | int,
    key_positions: Int[Array, " S"],
    chunk_size: int | None = None,
    window: int | None = None,
) -> Float[Array, "B T H V"]:
    """Return `attend` for keys and values with heads before tokens, as caches hold them: a step reads them in order."""
    last = first_query + jnp.arange(q.shape[1], dtype=jnp.int32)
    return _attend((q, k, v), first, last, key_positions, chunk_size or _CHUNK, window)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _attend(
    heads: tuple[jax.Array, jax.Array, jax.Array],
    first: jax.Array,
    last: jax.Array,
    columns: jax.Array,
    chunk_size: int,
    window: int | None,
) -> jax.Array:
    """Attend by chunks of queries; if that is not finite, by single queries that leave out what they do not see."""

    def chunks(heads: Any, seen: Any) -> jax.Array:
        return _by_chunks(_attend_chunk, heads, seen, chunk_size, window)

    return contained(chunks, functools.partial(_by_queries, window=window), heads, (first, last, columns))


def _by_queries(heads: Any, seen: Any, *, window: int | None = None) -> jax.Array:
    return _by_chunks(_attend_query, heads, seen, 1, window)


def _by_chunks(attend: Callable[..., jax.Array], heads: Any, seen: Any, size: int, window: int | None) -> jax.Array:
    """Return attend(q, k, v, first, last, columns), computed for `size` queries at a time."""
    (q, k, v), (first, last, columns) = heads, seen
    length = q.shape[1]
    if length <= size:
        return jax.checkpoint(attend)(q, k, v, first, last, columns)
    reach = k.shape[2] if window is None else min(k.shape[2], size + window - 1)  # keys that a chunk sees some of

    @jax.checkpoint
    def of_chunk(row: Any, k: jax.Array, v: jax.Array) -> jax.Array:
        q, first, last = row
        if reach == k.shape[2]:
            return attend(q, k, v, first, last, columns)
        begin = jnp.maximum(last[0] - (reach - size), 0)  # index of the first of them; the slice is moved to fit
        some = (jax.lax.dynamic_slice_in_dim(x, begin, reach, axis) for x, axis in ((k, 2), (v, 2), (columns, 0)))
        k_seen, v_seen, columns_seen = some
        return attend(q, k_seen, v_seen, first, last, columns_seen)

    def chunks(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, -length % size if i == axis else 0) for i in range(x.ndim)]
        shape = (*x.shape[:axis], -(-length // size), size, *x.shape[axis + 1 :])
        # Queries after the last one repeat it: one that sees no key would be NaN, also in gradients.
        return jnp.moveaxis(jnp.pad(x, padding, mode="edge").reshape(shape), axis, 0)

    rows = (chunks(q, 1), chunks(first, 1), chunks(last, 0))
    out = jax.lax.map(lambda row: of_chunk(row, k, v), rows)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -(-length // size) * size, q.shape[2], v.shape[-1])[:, :length]


def _attend_chunk(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array, columns: jax.Array
) -> jax.Array:
    (batch, rows, heads, size), key_heads = q.shape, k.shape[1]
    wide = _wide(q.dtype)
    groups = q.reshape(batch, rows, key_heads, heads // key_heads, size)
    scores = jnp.einsum("bthgk,bhsk->bhgts", groups, k, preferred_element_type=wide) * size**-0.5
    visible = _visible(columns, first, last)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgts,bhsv->bthgv", weights.astype(v.dtype), v, preferred_element_type=wide)
    return out.reshape(batch, rows, heads, v.shape[-1]).astype(v.dtype)


def _attend_query(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array, columns: jax.Array
) -> jax.Array:
    """Return `_attend_chunk` of one query, with zeros for the keys and values that it does not see."""
    visible = jnp.any(_visible(columns, first, last), axis=1)[:, None, :, None]
    k, v = (jnp.where(visible, x, jnp.zeros_like(x)) for x in (k, v))
    return _attend_chunk(q, k, v, first, last, columns)


def _visible(columns: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Return a mask of the keys that each query sees, [B, T, S], for keys at the positions `columns`."""
    column = columns[None, None]
    return (column >= first[..., None]) & (column <= last[None, :, None])


@jax.jit
def attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | None) -> jax.Array:
    """Return `attend` of queries with as many keys by cuDNN, which needs an NVIDIA GPU; None for `first` means 0."""

    def cudnn(heads: Any, seen: Any) -> jax.Array:
        q, k, v = heads[0], heads[1].swapaxes(1, 2), heads[2].swapaxes(1, 2)
        mask = None
        if first is not None:
            mask = (seen[2][None, None] >= seen[0][..., None])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")

    last = jnp.arange(q.shape[1], dtype=jnp.int32)
    seen = (jnp.zeros(q.shape[:2], jnp.int32) if first is None else first, last, last)
    return contained(cudnn, _by_queries, (q, k.swapaxes(1, 2), v.swapaxes(1, 2)), seen)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
