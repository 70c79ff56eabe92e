"""Causal softmax attention with rotary positions: the baseline that the delta rules are compared with."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from osdn_jax.nn import arguments, initializers
from osdn_jax.nn.config import AttentionConfig
from osdn_jax.nn.layers import RMSNorm, linear
from osdn_jax.nn.parallel import shard_size
from osdn_jax.nn.sharding import module_with_auto_axes
from osdn_jax.ops import checks
from osdn_jax.ops.containment import contained

_CHUNK = 512  # queries in a chunk, by default


class AttentionState(NamedTuple):
    """The cache of attention: the last S = max_length keys and values, the newest at the end.

    Attributes:
        keys: [B, S, Hk, K], already rotated.
        values: [B, S, Hk, V].
        position: position of the next token; the last key is at the position before it.
        start: [B], position at which the current segment began; the next token sees nothing before it.
    """

    keys: Float[Array, "B S Hk K"]
    values: Float[Array, "B S Hk V"]
    position: Int[Array, ""]
    start: Int[Array, " B"]


class SoftmaxAttention(nnx.Module):
    """Multi-head or grouped-query attention (arXiv 2305.13245), causal, with rotary positions (2104.09864).

    The projections have no bias; softmax is in float32. Optionally q and k are normalised per head before they are
    rotated (2302.05442), and the output is multiplied by a logistic gate of the input (2505.06708).

    A continuation sees its own tokens and the max_length tokens before it. Up to that length, processing a sequence in
    several calls equals one call; beyond it the oldest tokens drop out. A call without a state is not limited.

    Args:
        config: sizes and options.
        layers: number of layers of the whole model, which scales the initial output projection.
        dtype: of activations and matrix products; the parameters are float32.
        rngs: random streams for the parameters.

    Raises:
        ValueError: layers is below 1.
        TypeError: an argument is of another type.
    """

    def __init__(self, config: AttentionConfig, layers: int, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        """Create the parameters."""
        arguments.module(config, AttentionConfig, rngs, layers)
        self.config, self.dtype = config, checks.floating_dtype("dtype", dtype)
        width, results = config.width, config.heads * config.value_dim
        self.queries, self.keys = config.heads * config.key_dim, config.num_key_heads * config.key_dim
        outputs = self.queries + self.keys + config.num_key_heads * config.value_dim
        self.project = linear(width, outputs, dtype, rngs=rngs)  # q, k and v, fused
        self.output = linear(results, width, dtype, kernel_init=initializers.residual_kernel(layers), rngs=rngs)
        self.gate = linear(width, results, dtype, rngs=rngs) if config.output_gate else None

        def norm() -> RMSNorm | None:
            if not config.qk_norm:
                return None
            return RMSNorm(config.key_dim, config.norm_epsilon, rngs=rngs)

        self.query_norm, self.key_norm = norm(), norm()

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the projections fused along the last axis of a parameter, by the parameter's name."""
        values = self.config.num_key_heads * self.config.value_dim
        return {"project/kernel": (self.queries, self.keys, values)}

    def shard(self, count: int) -> nnx.GraphDef:
        """Return the graph of the mixer with 1/count of the heads; see `TensorParallel`."""
        heads = shard_size("heads", self.config.heads, count)
        key_heads = shard_size("key_heads", self.config.num_key_heads, count)
        return _graph(dataclasses.replace(self.config, heads=heads, key_heads=key_heads), self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: AttentionState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        context_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Mix a sequence, or its continuation from a state; one token at a time is decoding.

        Positions continue through packed segments: only their differences matter, and no token sees another segment.
        A token that is not finite (NaN or inf) reaches no token before it and no other segment.

        Args:
            x: tokens, [B, T, width].
            state: as returned by an earlier call; None at the start of a sequence.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
            context_axis: mesh axis that splits the sequence, as in `ops.delta_rule`: every device gathers the keys and
                values of all tokens for its queries.

        Returns:
            The output [B, T, width], and the state after the last token.

        Raises:
            ValueError: x is not [B, T, width], state is of another batch size or config, or segment_ids has another
                shape than x.
            TypeError: x is not a floating-point array, state is of another type of mixer, or segment_ids are not
                integers.
        """
        x = arguments.mixer_inputs(x, self.config.width, state, AttentionState)
        mix = functools.partial(SoftmaxAttention._mix, context_axis=context_axis)
        return module_with_auto_axes(mix, self, x, state, segment_ids)

    def _mix(
        self, x: jax.Array, state: AttentionState | None, segment_ids: jax.Array | None, *, context_axis: str | None
    ) -> tuple[jax.Array, AttentionState]:
        config = self.config
        (batch, length), heads = x.shape[:2], config.num_key_heads
        if segment_ids is not None:
            segment_ids = checks.segment_ids(segment_ids, (batch, length))
        q, k, v = jnp.split(self.project(x), [self.queries, self.queries + self.keys], axis=-1)
        q = q.reshape(batch, length, config.heads, config.key_dim)
        k, v = k.reshape(batch, length, heads, config.key_dim), v.reshape(batch, length, heads, config.value_dim)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)

        if state is None:
            position, start = jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32)
        else:
            _check_state(state, batch, config)
            position, start = state.position, state.start
        total, offset = length, jnp.zeros((), jnp.int32)
        if context_axis is not None:
            total, offset = length * jax.lax.axis_size(context_axis), length * jax.lax.axis_index(context_axis)
            if segment_ids is not None:
                segment_ids = jax.lax.all_gather(segment_ids, context_axis, axis=1, tiled=True)
        positions = position + offset + jnp.arange(length, dtype=jnp.int32)
        q, k = (rotate(y, positions, config.rotary_base) for y in (q, k))
        if context_axis is not None:
            k, v = (jax.lax.all_gather(y, context_axis, axis=1, tiled=True) for y in (k, v))
        all_starts = _segment_starts(position + jnp.arange(total, dtype=jnp.int32), start, segment_ids)
        starts = jax.lax.dynamic_slice_in_dim(all_starts, offset, length, axis=1)

        if state is None:
            keys, values, first = k, v, starts
        else:
            keys, values = jnp.concatenate([state.keys, k], axis=1), jnp.concatenate([state.values, v], axis=1)
            first = starts - position + config.max_length
        if state is None and context_axis is None and config.implementation == "cudnn":
            out = _attend_cudnn(q, k, v, None if segment_ids is None else starts)
        else:
            own_key = keys.shape[1] - total + offset
            out = attend(q, keys, values, first, first_query=own_key, chunk_size=config.chunk_size)

        out = out.reshape(batch, length, config.heads * config.value_dim)
        if self.gate is not None:
            out = out * jax.nn.sigmoid(self.gate(x))
        new_state = AttentionState(
            _last(keys, config.max_length),
            _last(values, config.max_length),
            position + total,
            jnp.concatenate([start[:, None], all_starts], axis=1)[:, -1],
        )
        return self.output(out), new_state


def _check_state(state: AttentionState, batch: int, config: AttentionConfig) -> None:
    lead = (batch, config.max_length, config.num_key_heads)
    for name, x, shape in (
        ("keys", state.keys, (*lead, config.key_dim)),
        ("values", state.values, (*lead, config.value_dim)),
        ("start", state.start, (batch,)),
    ):
        if x.shape != shape:
            raise ValueError(f"state: got {name} of shape {x.shape}, expected {shape}")


@functools.cache
def _graph(config: AttentionConfig, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: SoftmaxAttention(config, 1, dtype, rngs=nnx.Rngs(0))))


def rotate(x: Float[Array, "B T H K"], positions: Int[Array, " T"], base: float) -> Float[Array, "B T H K"]:
    """Rotate each pair (x_i, x_{i + K/2}) by the angle position * base^(-2i / K): rotary position embedding.

    The product of a query and a key then depends on the difference of their positions only. The pairs are those of
    Llama's code in Transformers; the paper (arXiv 2104.09864) pairs neighbours. Angles are float32.

    Args:
        x: queries or keys, [B, T, H, K] with even K.
        positions: [T] integers.
        base: base of the geometric series of frequencies, 10,000 in the paper.
    """
    half, wide = x.shape[-1] // 2, _wide(x.dtype)
    angles = positions.astype(wide)[:, None] * base ** (-jnp.arange(half, dtype=wide) / half)[None]
    cosine, sine = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([a * cosine - b * sine, a * sine + b * cosine], axis=-1).astype(x.dtype)


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    first: Int[Array, "B T"],
    *,
    first_query: Int[Array, ""] | int | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "B T H V"]:
    """Return softmax(q kᵀ / sqrt(K)) v, where query t sees the keys first[t] .. first_query + t.

    Whatever a query does not see does not affect it, NaN included. Chunks of queries are computed one after another,
    and recomputed in the backward pass, so that only [B, H, chunk_size, S] scores exist at a time; scores of keys that
    a query does not see are computed too. Key head h serves the query heads h H / Hk to (h + 1) H / Hk - 1. Scores and
    softmax are float32 (float64 for float64 inputs). Gradients exist in reverse mode only.

    Args:
        q: queries.
        k: keys.
        v: values.
        first: [B, T], index of the first key that each query sees; 0 or less for all of them.
        first_query: index of the first query's own key. Default: S - T, queries for the last keys.
        chunk_size: number of queries at a time. Default: 512.
    """
    last = (k.shape[1] - q.shape[1] if first_query is None else first_query) + jnp.arange(q.shape[1], dtype=jnp.int32)
    return _attend((q, k, v), first, last, chunk_size or _CHUNK)


@functools.partial(jax.jit, static_argnums=3)
def _attend(
    heads: tuple[jax.Array, jax.Array, jax.Array], first: jax.Array, last: jax.Array, chunk_size: int
) -> jax.Array:
    """Attend by chunks of queries; if that is not finite, by single queries that leave out what they do not see."""

    def chunks(heads: Any, seen: Any) -> jax.Array:
        return _by_chunks(_attend_chunk, heads, seen, chunk_size)

    return contained(chunks, _by_queries, heads, (first, last))


def _by_queries(heads: Any, seen: Any) -> jax.Array:
    return _by_chunks(_attend_query, heads, seen, 1)


def _by_chunks(attend: Callable[..., jax.Array], heads: Any, seen: Any, size: int) -> jax.Array:
    """Return attend(q, k, v, first, last), computed for `size` queries at a time."""
    (q, k, v), (first, last) = heads, seen
    length = q.shape[1]
    if length <= size:
        return attend(q, k, v, first, last)

    def chunks(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, -length % size if i == axis else 0) for i in range(x.ndim)]
        shape = (*x.shape[:axis], -(-length // size), size, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)

    rows = (chunks(q, 1), chunks(first, 1), chunks(last, 0))
    out = jax.lax.map(lambda row: attend(row[0], k, v, *row[1:]), rows)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -(-length // size) * size, q.shape[2], v.shape[-1])[:, :length]


@jax.checkpoint
def _attend_chunk(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    (batch, rows, heads, size), (columns, key_heads) = q.shape, k.shape[1:3]
    wide = _wide(q.dtype)
    groups = q.reshape(batch, rows, key_heads, heads // key_heads, size)
    scores = jnp.einsum("bthgk,bshk->bhgts", groups, k, preferred_element_type=wide) * size**-0.5
    visible = _visible(columns, first, last)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgts,bshv->bthgv", weights.astype(v.dtype), v, preferred_element_type=wide)
    return out.reshape(batch, rows, heads, v.shape[-1]).astype(v.dtype)


@jax.checkpoint
def _attend_query(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Return `_attend_chunk` of one query, with zeros for the keys and values that it does not see."""
    visible = jnp.any(_visible(k.shape[1], first, last), axis=1)[..., None, None]
    k, v = (jnp.where(visible, x, jnp.zeros_like(x)) for x in (k, v))
    return _attend_chunk(q, k, v, first, last)


def _visible(columns: int, first: jax.Array, last: jax.Array) -> jax.Array:
    """Return a mask of the keys that each query sees, [B, T, S]."""
    column = jnp.arange(columns, dtype=jnp.int32)[None, None]
    return (column >= first[..., None]) & (column <= last[None, :, None])


@jax.jit
def _attend_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array | None) -> jax.Array:
    def cudnn(heads: Any, seen: Any) -> jax.Array:
        q, k, v = heads
        mask = None
        if first is not None:
            mask = (jnp.arange(k.shape[1], dtype=jnp.int32)[None, None] >= seen[0][..., None])[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")

    last = jnp.arange(q.shape[1], dtype=jnp.int32)
    return contained(
        cudnn, _by_queries, (q, k, v), (jnp.zeros(q.shape[:2], jnp.int32) if first is None else first, last)
    )


def _segment_starts(positions: jax.Array, start: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Return the position at which each token's segment began, [B, T]; the first token continues the segment."""
    shape = (start.shape[0], positions.shape[0])
    if segment_ids is None:
        return jnp.broadcast_to(start[:, None], shape)
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    begun = jnp.where(segment_ids != before, jnp.broadcast_to(positions[None], shape), start[:, None])
    return jax.lax.cummax(begun, axis=1)


def _last(x: jax.Array, size: int) -> jax.Array:
    """Return the last `size` tokens, padded with zeros in front if there are fewer."""
    missing = max(size - x.shape[1], 0)
    return jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0)))[:, x.shape[1] + missing - size :]


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
