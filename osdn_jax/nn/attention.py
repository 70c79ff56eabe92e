"""Causal softmax attention: the baseline that the delta rules are compared with, and their partner in hybrids."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from osdn_jax.nn import arguments, cache, initializers
from osdn_jax.nn.config import AttentionConfig
from osdn_jax.nn.layers import RMSNorm, linear
from osdn_jax.nn.parallel import shard_size
from osdn_jax.nn.sharding import module_with_auto_axes
from osdn_jax.nn.softmax import attend_cache, attend_cudnn, rotate
from osdn_jax.ops import checks


class AttentionState(NamedTuple):
    """The cache of attention: the last S = max_length keys and values (with a window no more than the window).

    Attributes:
        keys: [B, Hk, S, K], already rotated; the key of position p is in slot p modulo S.
        values: [B, Hk, S, V], in the same slots.
        position: position of the next token.
        start: [B], position at which the current segment began; the next token sees nothing before it.
    """

    keys: Float[Array, "B Hk S K"]
    values: Float[Array, "B Hk S V"]
    position: Int[Array, ""]
    start: Int[Array, " B"]


class SoftmaxAttention(nnx.Module):
    """Multi-head or grouped-query attention (arXiv 2305.13245), causal, with rotary positions (2104.09864) or none.

    Softmax is in float32. Optionally q and k are normalised, per head or all heads together, before they are rotated
    (2302.05442), only the first channels of a head are rotated, each token sees a window of tokens only (2004.05150),
    and the output is multiplied by a logistic gate of the input (2505.06708).

    A token of a continuation sees itself and the max_length - 1 tokens before it. Up to that length, processing a
    sequence in several calls equals one call; beyond it the oldest tokens drop out. A call without a state is not
    limited.

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
        self.project = linear(width, outputs, dtype, bias=config.qkv_bias, rngs=rngs)  # q, k and v, fused
        self.output = linear(results, width, dtype, kernel_init=initializers.residual_kernel(layers), rngs=rngs)
        self.gate = linear(width, results, dtype, rngs=rngs) if config.output_gate else None

        def norm(heads: int) -> "RMSNorm | HeadsNorm | None":
            if not config.qk_norm:
                return None
            settings = (config.norm_epsilon, config.qk_norm_offset)
            if config.qk_norm_over == "all":
                return HeadsNorm(heads * config.key_dim, *settings, rngs=rngs)
            return RMSNorm(config.key_dim, *settings, rngs=rngs)

        self.query_norm, self.key_norm = norm(config.heads), norm(config.num_key_heads)

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the projections fused along the last axis of a parameter, by the parameter's name."""
        values = self.config.num_key_heads * self.config.value_dim
        names = ("project/kernel", "project/bias") if self.config.qkv_bias else ("project/kernel",)
        return dict.fromkeys(names, (self.queries, self.keys, values))

    def shard(self, count: int) -> nnx.GraphDef:
        """Return the graph of the mixer with 1/count of the heads; see `TensorParallel`."""
        heads = shard_size("heads", self.config.heads, count)
        key_heads = shard_size("key_heads", self.config.num_key_heads, count)
        return _graph(dataclasses.replace(self.config, heads=heads, key_heads=key_heads), self.dtype, count)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: AttentionState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        context_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Mix a sequence, or its continuation from a state; one token at a time is decoding.

        Positions count from the start of each packed segment, and no token sees another segment.
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

        before = None
        if state is not None:
            slots = (heads, config.cache_length)
            keys_and_values = {"keys": (state.keys, config.key_dim), "values": (state.values, config.value_dim)}
            cache.check_arrays(batch, {name: (x, (*slots, size)) for name, (x, size) in keys_and_values.items()})
            cache.check_arrays(batch, {"start": (state.start, ())})
            before = state.position, state.start
        places = cache.places(before, (batch, length), segment_ids, context_axis)
        position, first, own, of_keys, starts, following = places
        if config.rotary_base is not None:
            # From the start of the segment: the angles, and their rounding, do not depend on what lies before it.
            within = own[None] - starts
            q, k = (rotate(y, within, config.rotary_base, config.rotary_dim) for y in (q, k))
        if context_axis is not None:
            k, v = (jax.lax.all_gather(y, context_axis, axis=1, tiled=True) for y in (k, v))
        window = config.window if state is None else config.cache_length
        if window is not None:
            starts = jnp.maximum(starts, own[None] - (window - 1))

        after, keys, values = self._extended(state, k, v)
        if state is not None:
            of_slots = cache.slot_positions(config.cache_length, position + 1 if length == 1 else position)
            of_keys = of_slots if length == 1 else jnp.concatenate([of_slots, of_keys])
        if state is None and context_axis is None and config.implementation == "cudnn":
            out = attend_cudnn(q, k, v, None if segment_ids is None else starts)
        else:
            options: dict[str, Any] = {"key_positions": of_keys, "chunk_size": config.chunk_size}
            options["window"] = window if state is None else None  # slots of a cache are in another order
            out = attend_cache(q, keys, values, starts, first_query=first, **options)

        out = out.reshape(batch, length, config.heads * config.value_dim)
        if self.gate is not None:
            out = out * jax.nn.sigmoid(self.gate(x))
        return self.output(out), AttentionState(*after, *following)

    def _extended(
        self, state: AttentionState | None, k: jax.Array, v: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
        """Return (the cache after the tokens of k and v; keys and values, heads first, that they see some of)."""
        slots, length = self.config.cache_length, k.shape[1]
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if state is None:
            return (cache.first_cache(k, slots), cache.first_cache(v, slots)), k, v
        before, new = (state.keys, state.values), (k, v)
        after = tuple(cache.append(old, x, state.position) for old, x in zip(before, new, strict=True))
        if length == 1:  # the cache holds all that the token sees
            keys, values = (x.astype(k.dtype) for x in after)
        else:
            both = zip(before, new, strict=True)
            keys, values = (jnp.concatenate([old.astype(x.dtype), x], axis=2) for old, x in both)
        return cast(tuple[jax.Array, jax.Array], after), keys, values


class HeadsNorm(nnx.Module):
    """RMS norm over the channels of all heads together, as of queries and keys in OLMo 2 (arXiv 2501.00656).

    Args:
        features: H K, channels of all heads.
        epsilon: added to the mean of squares.
        offset: constant added to the scale, which starts at 1 - offset.
        rngs: random streams for the parameters.
    """

    def __init__(self, features: int, epsilon: float, offset: float, shards: int = 1, *, rngs: nnx.Rngs) -> None:
        """Create the scale of each channel; `shards` is the number of devices that share the heads."""
        self.scale = nnx.Param(jnp.full((features,), 1.0 - offset, jnp.float32))
        self.epsilon, self.offset, self.shards = epsilon, offset, shards

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        """Return x / sqrt(mean(x^2) + epsilon) * (offset + scale), the mean over heads and channels."""
        wide = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
        squares = jnp.mean(jnp.square(wide), axis=(-2, -1), keepdims=True)
        scale = self.scale[...].astype(wide.dtype) + self.offset
        if self.shards > 1:  # every device has the whole scale and some of the heads
            squares = jax.lax.pmean(squares, "tensor")
            size = x.shape[-2] * x.shape[-1]
            scale = jax.lax.dynamic_slice_in_dim(scale, jax.lax.axis_index("tensor") * size, size)
        return (wide * jax.lax.rsqrt(squares + self.epsilon) * scale.reshape(1, 1, *x.shape[-2:])).astype(x.dtype)


@functools.cache
def _graph(config: AttentionConfig, dtype: jnp.dtype, shards: int) -> nnx.GraphDef:
    def build() -> SoftmaxAttention:
        attention = SoftmaxAttention(config, 1, dtype, rngs=nnx.Rngs(0))
        for norm in (attention.query_norm, attention.key_norm):
            if isinstance(norm, HeadsNorm):
                norm.shards = shards
        return attention

    return nnx.graphdef(nnx.eval_shape(build))
