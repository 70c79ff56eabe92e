"""Causal multi-head latent attention without positions, the softmax attention of Kimi Linear."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from osdn_jax.nn import arguments, cache, initializers
from osdn_jax.nn.config import LatentAttentionConfig
from osdn_jax.nn.layers import RMSNorm, linear
from osdn_jax.nn.parallel import shard_size
from osdn_jax.nn.sharding import module_with_auto_axes
from osdn_jax.nn.softmax import attend, attend_cache
from osdn_jax.ops import checks

_ABSORBED = 16  # tokens of a continuation, at most, whose queries are projected to the latent space


class LatentState(NamedTuple):
    """The cache of latent attention: what the last S = max_length tokens' keys and values are computed from.

    Attributes:
        latents: [B, S, R + shared_key_dim]; the entry of position p is in slot p modulo S.
        position: position of the next token.
        start: [B], position at which the current segment began; the next token sees nothing before it.
    """

    latents: Float[Array, "B S R"]
    position: Int[Array, ""]
    start: Int[Array, " B"]


class LatentAttention(nnx.Module):
    """Multi-head latent attention (arXiv 2405.04434), causal, without positions, as in Kimi Linear (2510.26692).

    Keys and values of all heads are projections of one normalised latent per token; some key channels are shared by
    all heads. The cache holds latents. A step scores them directly, with the projections of keys and values applied to
    its queries and outputs instead.

    A token of a continuation sees itself and the max_length - 1 tokens before it, as in `SoftmaxAttention`.

    Args:
        config: sizes and options.
        layers: number of layers of the whole model, which scales the initial output projection.
        dtype: of activations and matrix products; the parameters are float32.
        rngs: random streams for the parameters.

    Raises:
        ValueError: layers is below 1.
        TypeError: an argument is of another type.
    """

    def __init__(self, config: LatentAttentionConfig, layers: int, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        """Create the parameters."""
        arguments.module(config, LatentAttentionConfig, rngs, layers)
        self.config, self.dtype = config, checks.floating_dtype("dtype", dtype)
        width, heads, rank = config.width, config.heads, config.query_rank
        self.query_down = None if rank is None else linear(width, rank, dtype, rngs=rngs)
        self.query_norm = None if rank is None else RMSNorm(rank, config.norm_epsilon, rngs=rngs)
        self.query = linear(rank or width, heads * (config.key_dim + config.shared_key_dim), dtype, rngs=rngs)
        self.down = linear(width, config.rank + config.shared_key_dim, dtype, rngs=rngs)
        self.norm = RMSNorm(config.rank, config.norm_epsilon, rngs=rngs)
        self.up = linear(config.rank, heads * (config.key_dim + config.value_dim), dtype, rngs=rngs)
        into = initializers.residual_kernel(layers)
        self.output = linear(heads * config.value_dim, width, dtype, kernel_init=into, rngs=rngs)

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """No projections are fused: queries, keys and values are stored head by head."""
        return {}

    def shard(self, count: int) -> nnx.GraphDef:
        """Return the graph of the mixer with 1/count of the heads; see `TensorParallel`."""
        heads = shard_size("heads", self.config.heads, count)
        return _graph(dataclasses.replace(self.config, heads=heads), self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LatentState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        context_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], LatentState]:
        """Mix a sequence, or its continuation from a state; one token at a time is decoding.

        A token that is not finite (NaN or inf) reaches no token before it and no other segment.

        Args:
            x: tokens, [B, T, width].
            state: as returned by an earlier call; None at the start of a sequence.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
            context_axis: mesh axis that splits the sequence, as in `ops.delta_rule`: every device gathers the latents
                of all tokens for its queries.

        Returns:
            The output [B, T, width], and the state after the last token.

        Raises:
            ValueError: x is not [B, T, width], state is of another batch size or config, or segment_ids has another
                shape than x.
            TypeError: x is not a floating-point array, state is of another type of mixer, or segment_ids are not
                integers.
        """
        x = arguments.mixer_inputs(x, self.config.width, state, LatentState)
        mix = functools.partial(LatentAttention._mix, context_axis=context_axis)
        return module_with_auto_axes(mix, self, x, state, segment_ids)

    def _mix(
        self, x: jax.Array, state: LatentState | None, segment_ids: jax.Array | None, *, context_axis: str | None
    ) -> tuple[jax.Array, LatentState]:
        config, (batch, length), slots = self.config, x.shape[:2], self.config.max_length
        if segment_ids is not None:
            segment_ids = checks.segment_ids(segment_ids, (batch, length))
        q = self._queries(x)
        latents, shared = jnp.split(self.down(x), [config.rank], axis=-1)
        latents = jnp.concatenate([self.norm(latents), shared], axis=-1)

        before = None
        if state is not None:
            shape = (slots, config.rank + config.shared_key_dim)
            cache.check_arrays(batch, {"latents": (state.latents, shape), "start": (state.start, ())})
            before = state.position, state.start
        places = cache.places(before, (batch, length), segment_ids, context_axis)
        position, first, own, of_keys, starts, following = places
        if context_axis is not None:
            latents = jax.lax.all_gather(latents, context_axis, axis=1, tiled=True)

        if state is None:
            after = cache.first_cache(latents, slots)
        else:
            after = cache.append(state.latents, latents, position)
            starts = jnp.maximum(starts, own[None] - (slots - 1))
            of_slots = cache.slot_positions(slots, position + 1 if length == 1 else position)
            if length == 1:  # the cache holds all that the token sees
                latents, of_keys = after.astype(x.dtype), of_slots
            else:
                latents = jnp.concatenate([state.latents.astype(x.dtype), latents], axis=1)
                of_keys = jnp.concatenate([of_slots, of_keys])
        seen = (starts, first, of_keys)
        absorbed = state is not None and length <= _ABSORBED
        out = self._absorbed(q, latents, *seen) if absorbed else self._expanded(q, latents, *seen)
        out = self.output(out.reshape(batch, length, config.heads * config.value_dim))
        return out, LatentState(after, *following)

    def _queries(self, x: jax.Array) -> jax.Array:
        lead = x.shape[:2]
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        return self.query(x).reshape(*lead, self.config.heads, self.config.key_dim + self.config.shared_key_dim)

    def _expanded(
        self, q: jax.Array, latents: jax.Array, first: jax.Array, first_query: jax.Array, of_keys: jax.Array
    ) -> jax.Array:
        """Attend with the keys and values of every head."""
        config = self.config
        latents, shared = jnp.split(latents, [config.rank], axis=-1)
        both = self.up(latents).reshape(*latents.shape[:2], config.heads, config.key_dim + config.value_dim)
        k, v = jnp.split(both, [config.key_dim], axis=-1)
        shared = jnp.broadcast_to(shared[:, :, None], (*k.shape[:3], config.shared_key_dim))
        k = jnp.concatenate([k, shared], axis=-1)
        options: dict[str, Any] = {"key_positions": of_keys, "chunk_size": config.chunk_size}
        return attend(q, k, v, first, first_query=first_query, **options)

    def _absorbed(
        self, q: jax.Array, latents: jax.Array, first: jax.Array, first_query: jax.Array, of_keys: jax.Array
    ) -> jax.Array:
        """Attend to the latents themselves, as one key head with queries of R + shared channels."""
        config = self.config
        up = self.up.kernel[...].astype(q.dtype)
        up = up.reshape(config.rank, config.heads, config.key_dim + config.value_dim)
        own, shared = jnp.split(q, [config.key_dim], axis=-1)
        own = jnp.einsum("bthk,rhk->bthr", own, up[..., : config.key_dim])
        # `attend` scales by the size of these queries; the scale is that of the heads' own queries.
        scale = ((config.rank + config.shared_key_dim) / q.shape[-1]) ** 0.5
        wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32  # a scale in bfloat16 would be wrong by 0.1 %
        q = (jnp.concatenate([own, shared], axis=-1).astype(wide) * scale).astype(q.dtype)
        keys, values = latents[:, None], latents[:, None, :, : config.rank]
        options: dict[str, Any] = {"key_positions": of_keys, "chunk_size": config.chunk_size}
        out = attend_cache(q, keys, values, first, first_query=first_query, **options)
        return jnp.einsum("bthr,rhv->bthv", out, up[..., config.key_dim :])


@functools.cache
def _graph(config: LatentAttentionConfig, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: LatentAttention(config, 1, dtype, rngs=nnx.Rngs(0))))
