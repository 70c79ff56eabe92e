"""The token mixer: projections, short convolution, gates and a rule of `osdn_jax.ops`."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from osdn_jax import ops
from osdn_jax.nn import arguments, initializers
from osdn_jax.nn.config import MixerConfig
from osdn_jax.nn.gates import ChannelGate, DecayGate, ForgetGate, HeadForgetGate, OutputGate
from osdn_jax.nn.layers import NoDecayParam, RMSNorm, ShortConvolution, linear, unit_norm
from osdn_jax.nn.parallel import shard_size
from osdn_jax.nn.sharding import module_with_auto_axes
from osdn_jax.ops import State, checks
from osdn_jax.ops.rules.entry import Gram, Hypergradient, Squares, matched_step, preconditioned_delta_rule


class MixerState(NamedTuple):
    """The state of a mixer after the tokens of a call, of a size that does not depend on their number; a pytree.

    Attributes:
        window: the last inputs of the short convolution, [B, conv_size - 1, channels]; [B, 0, 0] without one.
        rule: the state of the rule.
    """

    window: Float[Array, "B W C"]
    rule: State


class WriteInputs(NamedTuple):
    """Arrays that a mixer's recurrence is computed from; a pytree.

    Token t writes S_t = S~ + beta_t (d_t * k_t) (v_t - S~^T k_t)^T with S~ the decayed state and d the multipliers.

    Attributes:
        q: queries, [B, T, Hk, K].
        k: keys that the state is read with before a write, [B, T, Hk, K]. In GDN-2: erase gate times key.
        v: values, [B, T, H, V]. In GDN-2: write gate times value.
        beta: step size of the write, [B, T, H]; ones for a mixer without it.
        log_decay: log of the factor on the state, [B, T, H] or [B, T, H, K]; None without decay.
        multipliers: d, the factor on k that gives the write key, [B, T, Hk or H, K]; ones without a preconditioner. In
            GDN-2, which writes under the key without its erase gate: 1 / erase gate.
    """

    q: Float[Array, "B T Hk K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T H V"]
    beta: Float[Array, "B T H"]
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None
    multipliers: Float[Array, "B T P K"]


class DeltaMixer(nnx.Module):
    """A token mixer of the delta-rule family; its config selects the rule.

    q, k and v are projections without bias, each followed by a short convolution (unless config.conv_size is 0) and
    SiLU; q and k are normalised to unit length (k only if config.key_norm is True). beta is a logistic gate, or
    config.fixed_beta; the erase gate (per key head) and the write gate that replace it in GDN-2 are logistic too. The
    output is normalised per head, then gated if config.output_gate is True, and projected back.

    Args:
        config: sizes and rule, as `mixer_config` returns them.
        layers: number of layers of the whole model, which scales the initial output projection.
        dtype: of activations and matrix products; the parameters are float32.
        rngs: random streams for the parameters.

    Raises:
        ValueError: layers is below 1.
        TypeError: an argument is of another type.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from osdn_jax import nn
        >>> config = nn.mixer_config("os_gdn", width=16, heads=2, key_dim=4, value_dim=8)
        >>> mixer = nn.DeltaMixer(config, layers=1, dtype=jnp.float32, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((1, 6, 16))
        >>> y, state = mixer(x)  # prefill
        >>> y, state = mixer(x[:, :1], state)  # decode one token
        >>> y.shape
        (1, 1, 16)
    """

    def __init__(self, config: MixerConfig, layers: int, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        """Create the parameters."""
        arguments.module(config, MixerConfig, rngs, layers)
        self.config, self.dtype = config, checks.floating_dtype("dtype", dtype)
        width, heads, key_heads = config.width, config.heads, config.num_key_heads
        self.keys, self.values = key_heads * config.key_dim, heads * config.value_dim
        self.project = linear(width, 2 * self.keys + self.values, dtype, rngs=rngs)  # q, k and v, fused
        channels = 2 * self.keys + self.values
        self.convolution = ShortConvolution(channels, config.conv_size, rngs=rngs) if config.conv_size else None
        by_channel = config.strength == "channel"
        gate_of_beta = config.gated_write and config.fixed_beta is None
        betas = key_heads if config.beta_per_key_head else heads
        self.beta = linear(width, betas, dtype, rngs=rngs) if gate_of_beta else None
        self.norm = RMSNorm(config.value_dim, config.norm_epsilon, rngs=rngs)
        self.output = linear(self.values, width, dtype, kernel_init=initializers.residual_kernel(layers), rngs=rngs)
        self.gate = _output_gate(config, self.values, dtype, rngs) if config.output_gate else None

        # Each of these is assigned once: NNX decides at the first assignment whether an attribute holds parameters.
        by_decay = (config.key_dim if config.decay == "channel" else None, dtype, config.decay_rank, config.decay_bound)
        scaled = config.decay_scale
        self.decay = None if config.decay == "none" else DecayGate(width, heads, *by_decay, scaled, rngs=rngs)

        self.erase_gate = ChannelGate(width, key_heads, config.key_dim, dtype, rngs=rngs) if by_channel else None
        self.write_gate = ChannelGate(width, heads, config.value_dim, dtype, rngs=rngs) if by_channel else None

        scales, settings = config.preconditioner_heads, config.hypergradient
        by_feedback, by_gram = (config.preconditioner == name for name in ("hypergradient", "gram"))
        first = config.squares.initial if config.preconditioner == "squares" else settings.initial
        start = jnp.full((scales, config.key_dim), first, jnp.float32)
        self.initial = NoDecayParam(start) if config.preconditioner in ("hypergradient", "squares") else None
        learned_eta = by_feedback and settings.learned_eta
        self.eta = NoDecayParam(jnp.full((scales,), settings.eta, jnp.float32)) if learned_eta else None
        gate = settings.forget_gate if by_feedback and settings.forget else "constant"
        by_token = ForgetGate(width, scales) if gate == "token" else None
        self.forget = HeadForgetGate(scales) if gate == "head" else by_token
        self.gram_decay = DecayGate(width, scales, None, dtype, rngs=rngs) if by_gram else None
        self.gram_gain = linear(width, scales, dtype, rngs=rngs) if by_gram else None
        self.gram_center = NoDecayParam(jnp.full((scales,), config.gram.center, jnp.float32)) if by_gram else None
        log_squash = jnp.full((scales,), math.log(config.gram.squash), jnp.float32)
        self.gram_log_squash = NoDecayParam(log_squash) if by_gram and config.gram.learned_squash else None

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the projections fused along the last axis of a parameter, by the parameter's name."""
        names = ("project/kernel", "convolution/kernel") if self.config.conv_size else ("project/kernel",)
        return dict.fromkeys(names, (self.keys, self.keys, self.values))

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
        """Mix a sequence, or continue one from a state; a sequence of one token is decoding.

        Args:
            x: tokens, [B, T, width].
            state: the state that an earlier call returned; default zeros.
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
            context_axis: mesh axis that the sequence is split over; see `ops.delta_rule`.

        Returns:
            (output [B, T, width], state after the last token).

        Raises:
            ValueError: x is not [B, T, width], state is of another batch size or config, or segment_ids has another
                shape than x.
            TypeError: x is not a floating-point array, state is of another type of mixer, or segment_ids are not
                integers.
        """
        x = arguments.mixer_inputs(x, self.config.width, state, MixerState)
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
            activation = jax.nn.silu if self.config.output_gate_activation == "silu" else jax.nn.sigmoid
            out = out * activation(self.gate(x)).reshape(out.shape)
        return self.output(out.reshape(*x.shape[:2], self.values)), MixerState(window, rule)

    def multipliers(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T P K"]:
        """Return the factor of the preconditioner on each key that is written.

        Args:
            x: tokens, [B, T, width].
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.

        Returns:
            [B, T, P, K], P preconditioners; the write key is this factor times k.

        Raises:
            ValueError: the mixer has no preconditioner, or x is not [B, T, width].
            TypeError: x is not a floating-point array.
        """
        config, x = self.config, arguments.mixer_inputs(x, self.config.width)
        _, k, _, _ = self._heads(x, None, segment_ids, None)
        shared: dict[str, Any] = {"segment_ids": segment_ids, "chunk_size": config.chunk_size}
        if config.preconditioner == "none":
            raise ValueError("multipliers: got a mixer with preconditioner='none', expected one with a preconditioner")
        k = self._preconditioned_keys(k)
        if config.preconditioner == "gram":
            factors = ops.gram_preconditioner(k, **self._gram(x)._asdict(), **shared)[0]
        elif config.preconditioner == "squares":
            factors = ops.squares_preconditioner(k, **self._squares()._asdict(), **shared)[0]
        else:
            settings = self._hypergradient(x)._asdict()
            beta = None
            if settings.pop("beta_aware"):
                beta, k = self._beta(x), jnp.repeat(k, config.heads // k.shape[2], axis=2)
            factors = ops.hypergradient_preconditioner(k, beta, **settings, **shared)[0]
        return jnp.broadcast_to(matched_step(factors * k, k), factors.shape) if config.match_step else factors

    def write_inputs(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> WriteInputs:
        """Return what the recurrence is computed from, for diagnostics.

        Args:
            x: tokens, [B, T, width].
            segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.

        Raises:
            ValueError: the mixer does not erase, so it has no residual, or x is not [B, T, width].
            TypeError: x is not a floating-point array.
        """
        config, x = self.config, arguments.mixer_inputs(x, self.config.width)
        if not config.erase:
            raise ValueError("write_inputs: got a mixer with erase=False, expected a delta rule, which erases")
        q, k, v, _ = self._heads(x, None, segment_ids, None)
        log_decay = None if self.decay is None else self.decay(x)
        if self.erase_gate is not None and self.write_gate is not None:
            erase_gate, write_gate = self.erase_gate(x), self.write_gate(x)
            erase_gate = 2.0 * erase_gate if config.negative_eigenvalues else erase_gate
            k, v, d = (erase_gate * k.astype(jnp.float32), write_gate * v.astype(jnp.float32), 1.0 / erase_gate)
        elif config.preconditioner == "none":
            d = jnp.ones(k.shape, jnp.float32)
        else:
            d = self.multipliers(x, segment_ids)
        beta = self._beta(x) if config.gated_write else jnp.ones(v.shape[:3], jnp.float32)
        return WriteInputs(q, k, v, beta, log_decay, d)

    def _heads(
        self, x: jax.Array, window: jax.Array | None, segment_ids: jax.Array | None, context_axis: str | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values by head, and the convolution's window after the last token."""
        config, lead = self.config, x.shape[:2]
        mixed = self.project(x)
        if self.convolution is None:
            if window is not None and window.shape != (x.shape[0], 0, 0):
                raise ValueError(f"window: got shape {window.shape}, expected {(x.shape[0], 0, 0)} without convolution")
            window = jnp.zeros((x.shape[0], 0, 0), x.dtype)
        else:
            mixed, window = self.convolution(mixed, window, segment_ids, context_axis)
        q, k, v = jnp.split(jax.nn.silu(mixed), [self.keys, 2 * self.keys], axis=-1)
        q, k = (y.reshape(*lead, config.num_key_heads, config.key_dim) for y in (q, k))
        q, k = unit_norm(q), unit_norm(k) if config.key_norm else k
        return q, k, v.reshape(*lead, config.heads, config.value_dim), window

    def _beta(self, x: jax.Array) -> jax.Array:
        if self.config.fixed_beta is not None:
            return jnp.full((*x.shape[:2], self.config.heads), self.config.fixed_beta, jnp.float32)
        gate: Any = self.beta
        beta = jax.nn.sigmoid(gate(x).astype(jnp.float32))
        if self.config.beta_per_key_head:
            beta = jnp.repeat(beta, self.config.heads // beta.shape[2], axis=2)
        return 2.0 * beta if self.config.negative_eigenvalues else beta

    def _preconditioned_keys(self, k: jax.Array) -> jax.Array:
        """Return keys [B, T, P, K] of the preconditioners that do not depend on beta."""
        if not self.config.preconditioner_per_value_head:
            return k
        return jnp.repeat(k, self.config.heads // k.shape[2], axis=2)

    def _hypergradient(self, x: jax.Array) -> Hypergradient:
        """Return the preconditioner's arguments for the tokens x."""
        settings, initial = self.config.hypergradient, cast(NoDecayParam, self.initial)
        return Hypergradient(
            eta=settings.eta if self.eta is None else self.eta[...].astype(jnp.float32),
            log_forget=self._log_forget(x),
            initial=initial[...].astype(jnp.float32),
            anchor=settings.anchor,
            bounds=settings.bounds,
            normalize=settings.normalize,
            beta_aware=settings.beta_aware,
        )

    def _log_forget(self, x: jax.Array) -> jax.Array | None:
        """Return the log of what each token keeps of the preconditioners, [B, T, P], or None for all of it."""
        settings = self.config.hypergradient
        if self.forget is not None:
            return self.forget(x)
        if not settings.forget:
            return None
        shape = (*x.shape[:2], self.config.preconditioner_heads)
        return jnp.full(shape, math.log(settings.forget_constant), jnp.float32)

    def _gram(self, x: jax.Array) -> Gram:
        """Return the preconditioner's arguments for the tokens x."""
        decay, gain, center = cast(tuple[Any, Any, Any], (self.gram_decay, self.gram_gain, self.gram_center))
        return Gram(
            log_decay=decay(x),
            gain=jax.nn.sigmoid(gain(x).astype(jnp.float32)),
            center=center[...].astype(jnp.float32),
            squash=self.config.gram.squash,
            log_squash=None if self.gram_log_squash is None else self.gram_log_squash[...].astype(jnp.float32),
        )

    def _squares(self) -> Squares:
        """Return the preconditioner's arguments."""
        settings, initial = self.config.squares, cast(NoDecayParam, self.initial)
        return Squares(settings.average, settings.normalize, initial[...].astype(jnp.float32))

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
        log_decay = None if self.decay is None else self.decay(x)
        shared: dict[str, Any] = {
            "initial_state": carried,
            "segment_ids": segment_ids,
            "chunk_size": config.chunk_size,
            "implementation": config.implementation,
            "context_axis": context_axis,
        }
        if self.erase_gate is not None and self.write_gate is not None:
            # The erase gate alone decides the eigenvalues of the transition: the write gate stays in (0, 1).
            erase_gate, write_gate, decay = self.erase_gate(x), self.write_gate(x), cast(jax.Array, log_decay)
            erase_gate = 2.0 * erase_gate if config.negative_eigenvalues else erase_gate
            return ops.gdn2(q, k, v, erase_gate=erase_gate, write_gate=write_gate, log_decay=decay, **shared)
        preconditioner: Hypergradient | Gram | Squares | None = None
        if config.preconditioner == "hypergradient":
            preconditioner = self._hypergradient(x)
        elif config.preconditioner == "gram":
            preconditioner = self._gram(x)
        elif config.preconditioner == "squares":
            preconditioner = self._squares()
        if preconditioner is not None:
            q, k = self._preconditioned_keys(q), self._preconditioned_keys(k)
        return preconditioned_delta_rule(
            q,
            k,
            v,
            beta=self._beta(x) if config.gated_write else None,
            log_decay=log_decay,
            erase=config.erase,
            preconditioner=preconditioner,
            match_step=config.match_step,
            **shared,
        )


def _output_gate(config: MixerConfig, outputs: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    if config.output_gate_rank is None and not config.output_gate_bias:
        return linear(config.width, outputs, dtype, rngs=rngs)
    return OutputGate(config.width, outputs, config.output_gate_rank, config.output_gate_bias, dtype, rngs=rngs)


@functools.cache
def _graph(config: MixerConfig, dtype: jnp.dtype) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: DeltaMixer(config, 1, dtype, rngs=nnx.Rngs(0))))
