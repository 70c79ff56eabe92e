"""The token mixer: projections, short convolution, gates and a rule of `osdn_jax.ops`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from osdn_jax import ops
from osdn_jax.nn import initializers
from osdn_jax.nn.config import MixerConfig
from osdn_jax.nn.gates import ChannelGate, DecayGate, ForgetGate
from osdn_jax.nn.layers import NoDecayParam, RMSNorm, ShortConvolution, linear, unit_norm
from osdn_jax.nn.parallel import shard_size
from osdn_jax.nn.sharding import module_with_auto_axes
from osdn_jax.ops import State


class MixerState(NamedTuple):
    """What a mixer carries from one piece of a sequence to the next: constant in its length."""

    window: Float[Array, "B W C"]  # the last inputs of the short convolution
    rule: State


class DeltaMixer(nnx.Module):
    """A mixer of the delta-rule family, whose rule comes from its config.

    q, k and v are bias-free projections, each followed by a short convolution and SiLU; q and k have unit length;
    beta is a logistic gate, and so are the two that may take its place, of which the erase gate is per key head. The
    output is normalised per head, gated if asked for, and projected back.
    """

    def __init__(self, config: MixerConfig, layers: int, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        """layers: of the whole model, for the scale at which the last projection starts."""
        self.config, self.dtype = config, dtype
        width, heads, key_heads = config.width, config.heads, config.num_key_heads
        self.keys, self.values = key_heads * config.key_dim, heads * config.value_dim
        self.project = linear(width, 2 * self.keys + self.values, dtype, rngs=rngs)  # q, k and v at once
        self.convolution = ShortConvolution(2 * self.keys + self.values, config.conv_size, rngs=rngs)
        by_channel = config.strength == "channel"
        gated_write = (config.erase or config.decay == "scalar") and not by_channel
        self.beta = linear(width, heads, dtype, rngs=rngs) if gated_write else None
        self.norm = RMSNorm(config.value_dim, config.norm_epsilon, rngs=rngs)
        self.output = linear(self.values, width, dtype, kernel_init=initializers.residual_kernel(layers), rngs=rngs)
        self.gate = linear(width, self.values, dtype, rngs=rngs) if config.output_gate else None

        # Each of these is assigned once: NNX decides at the first assignment whether an attribute holds parameters.
        channels = config.key_dim if config.decay == "channel" else None
        self.decay = None if config.decay == "none" else DecayGate(width, heads, channels, dtype, rngs=rngs)

        self.erase_gate = ChannelGate(width, key_heads, config.key_dim, dtype, rngs=rngs) if by_channel else None
        self.write_gate = ChannelGate(width, heads, config.value_dim, dtype, rngs=rngs) if by_channel else None

        scales, settings = config.preconditioner_heads, config.hypergradient
        by_feedback, by_gram = (config.preconditioner == name for name in ("hypergradient", "gram"))
        start = jnp.full((scales, config.key_dim), settings.initial, jnp.float32)  # typed: steps return it so
        self.initial = NoDecayParam(start) if by_feedback else None
        self.forget = ForgetGate(width, scales) if by_feedback and settings.forget else None
        self.gram_decay = DecayGate(width, scales, None, dtype, rngs=rngs) if by_gram else None
        self.gram_gain = linear(width, scales, dtype, rngs=rngs) if by_gram else None
        self.gram_center = NoDecayParam(jnp.full((scales,), config.gram.center, jnp.float32)) if by_gram else None

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the projections fused along the last axis of a parameter, by the parameter's name."""
        return dict.fromkeys(("project/kernel", "convolution/kernel"), (self.keys, self.keys, self.values))

    def shard(self, count: int) -> nnx.GraphDef:
        """Return the graph of the mixer with 1/count of the heads; see `TensorParallel`."""
        heads = shard_size("heads", self.config.heads, count)
        key_heads = shard_size("key_heads", self.config.num_key_heads, count)
        config = dataclasses.replace(self.config, heads=heads, key_heads=key_heads)
        return _graph(config, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: MixerState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        context_axis: str | None = None,
    ) -> tuple[Float[Array, "B T D"], MixerState]:
        """Mixes a sequence, or its continuation from a state; one token at a time is decoding.

        Returns the output and the state after the last token. context_axis: as in `ops.delta_rule`.

        Raises:
            ValueError: a state of another batch or config; segment_ids of another shape than x.
            TypeError: a state of another mixer; segment_ids that are no integers.
        """
        if not isinstance(state, MixerState | None):
            raise TypeError(f"state: got a {type(state).__name__}, expected the MixerState of such a mixer or None")
        mix = functools.partial(DeltaMixer._mix, context_axis=context_axis)
        return module_with_auto_axes(mix, self, x, state, segment_ids)

    def _mix(
        self, x: jax.Array, state: MixerState | None, segment_ids: jax.Array | None, *, context_axis: str | None
    ) -> tuple[jax.Array, MixerState]:
        window, carried = (None, None) if state is None else state
        q, k, v, window = self._heads(x, window, segment_ids, context_axis)
        out, rule = self._rule(x, q, k, v, carried, segment_ids, context_axis)
        out = self.norm(out)
        if self.gate is not None:
            out = out * jax.nn.silu(self.gate(x)).reshape(out.shape)
        return self.output(out.reshape(*x.shape[:2], self.values)), MixerState(window, rule)

    def multipliers(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T P K"]:
        """What the preconditioner multiplies each key by before it is written; P preconditioners.

        Raises ValueError for a mixer without a preconditioner.
        """
        config = self.config
        _, k, _, _ = self._heads(x, None, segment_ids, None)
        options: dict[str, Any] = {"segment_ids": segment_ids, "chunk_size": config.chunk_size}
        if config.preconditioner == "none":
            raise ValueError("multipliers: got a mixer with preconditioner='none', expected 'hypergradient' or 'gram'")
        if config.preconditioner == "gram":
            (log_decay, gain), more = self._gram(x)
            return ops.gram_preconditioner(k, log_decay, gain, **more, **options)[0]
        more = self._hypergradient(x)
        beta = None
        if more.pop("beta_aware"):
            beta, k = self._beta(x), jnp.repeat(k, config.heads // config.num_key_heads, axis=2)
        return ops.hypergradient_preconditioner(k, beta, **more, **options)[0]

    def _heads(
        self, x: jax.Array, window: jax.Array | None, segment_ids: jax.Array | None, context_axis: str | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values by head, and the convolution's window after the last token."""
        config, lead = self.config, x.shape[:2]
        mixed, window = self.convolution(self.project(x), window, segment_ids, context_axis)
        q, k, v = jnp.split(jax.nn.silu(mixed), [self.keys, 2 * self.keys], axis=-1)
        q, k = (unit_norm(y.reshape(*lead, config.num_key_heads, config.key_dim)) for y in (q, k))
        return q, k, v.reshape(*lead, config.heads, config.value_dim), window

    def _beta(self, x: jax.Array) -> jax.Array:
        gate: Any = self.beta
        beta = jax.nn.sigmoid(gate(x).astype(jnp.float32))
        return 2.0 * beta if self.config.negative_eigenvalues else beta

    def _hypergradient(self, x: jax.Array) -> dict[str, Any]:
        settings, initial = self.config.hypergradient, cast(NoDecayParam, self.initial)
        return {
            "eta": settings.eta,
            "bounds": settings.bounds,
            "anchor": settings.anchor,
            "normalize": settings.normalize,
            "beta_aware": settings.beta_aware,
            "initial": initial[...],
            "log_forget": None if self.forget is None else self.forget(x),
        }

    def _gram(self, x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], dict[str, Any]]:
        """(log decay and gain of each token, options)."""
        decay, gain, center = cast(tuple[Any, Any, Any], (self.gram_decay, self.gram_gain, self.gram_center))
        options = {"center": center[...], "squash": self.config.gram.squash}
        return (decay(x), jax.nn.sigmoid(gain(x).astype(jnp.float32))), options

    def _rule(
        self,
        x: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        carried: State | None,
        segment_ids: jax.Array | None,
        context_axis: str | None,
    ) -> tuple[jax.Array, State]:
        config = self.config
        arguments = [q, k, v]
        if self.beta is not None:
            arguments.append(self._beta(x))
        if self.erase_gate is not None and self.write_gate is not None:
            # What decides the eigenvalues is what is erased: the write gate stays in (0, 1).
            erase = self.erase_gate(x)
            arguments += [2.0 * erase if config.negative_eigenvalues else erase, self.write_gate(x)]
        if self.decay is not None:
            arguments.append(self.decay(x))
        options: dict[str, Any] = {
            "initial_state": carried,
            "segment_ids": segment_ids,
            "chunk_size": config.chunk_size,
            "implementation": config.implementation,
            "context_axis": context_axis,
        }
        if config.preconditioner == "hypergradient":
            options |= self._hypergradient(x)
        elif config.preconditioner == "gram":
            tokens, more = self._gram(x)
            arguments += tokens
            options |= more
        return _OPERATORS[config.erase, config.strength, config.preconditioner, config.decay](*arguments, **options)


@functools.cache
def _graph(config: MixerConfig, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: DeltaMixer(config, 1, dtype, rngs=nnx.Rngs(0))))


_OPERATORS: dict[tuple[bool, str, str, str], Callable[..., tuple[jax.Array, State]]] = {
    (False, "scalar", "none", "none"): ops.linear_attention,
    (False, "scalar", "none", "scalar"): ops.mamba2,
    (False, "scalar", "none", "channel"): ops.gla,
    (True, "scalar", "none", "none"): ops.delta_net,
    (True, "scalar", "none", "scalar"): ops.gated_delta_net,
    (True, "scalar", "none", "channel"): ops.kda,
    (True, "channel", "none", "channel"): ops.gdn2,
    (True, "scalar", "hypergradient", "none"): ops.osdn,
    (True, "scalar", "hypergradient", "scalar"): ops.os_gdn,
    (True, "scalar", "hypergradient", "channel"): ops.os_kda,
    (True, "scalar", "gram", "none"): ops.pdn,
    (True, "scalar", "gram", "scalar"): ops.pgdn,
    (True, "scalar", "gram", "channel"): ops.pkda,
}
