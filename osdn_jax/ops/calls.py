"""Checked calls of the operators: their arrays, and the options that are static under jit.

Every implementation of an operator is a function of one such pair. Each call has a field `resets`, since
`osdn_jax.ops.dispatch` handles packed sequences for all operators.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Bounds = tuple[float, float] | None  # (lo, hi) of the projection, or None for no projection


class DeltaRuleCall(NamedTuple):
    """Arrays of the delta rule; a single step has no T axis.

    Axes: B batch, T tokens, Hk key heads, H value heads, K and V the sizes of a key and a value. q, k, w and v keep
    their types; the other floating-point arrays are float32 or float64.
    """

    state: jax.Array  # [B, H, K, V]
    q: jax.Array  # [B, T, Hk, K]
    k: jax.Array  # [B, T, Hk, K]
    w: jax.Array | None  # write key [B, T, Hk or H, K]; None means k
    v: jax.Array  # [B, T, H, V]
    beta: jax.Array  # [B, T, H]
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K]
    resets: jax.Array | None  # [B, T] bool: the state is zeroed before this token

    @property
    def channel_decay(self) -> bool:
        """True if the decay of a sequence is per channel."""
        return self.log_decay is not None and self.log_decay.ndim == 4

    def tokens(self) -> "DeltaRuleCall":
        """Return the call without its state: only arrays with an axis of tokens."""
        return self._replace(state=None)  # type: ignore[arg-type]


class DeltaRuleOptions(NamedTuple):
    """Static options of the delta rule."""

    erase: bool
    scale: float
    chunk_size: int | None
    context_axis: str | None


class HypergradientTokens(NamedTuple):
    """Tokens as the hypergradient recurrence reads them; the leading axes are [B] for one, [B, C] for a chunk."""

    u: jax.Array  # squared keys [..., P, K]
    beta: jax.Array | None  # [..., P]; None means 1
    step: jax.Array  # eta * b_t, divided by the normaliser if there is one [..., P]
    log_forget: jax.Array | None  # [..., P]
    reset: jax.Array | None  # [...] bool: the state is replaced by HypergradientStart.after_reset before this token


class HypergradientStart(NamedTuple):
    """Initial values of the hypergradient recurrence and the anchor of its forgetting.

    `after_reset` is the public argument `restart`.
    """

    initial: jax.Array  # state before the first token [B, P, K]
    after_reset: jax.Array  # state at the start of every later segment [B, P, K]
    anchor: jax.Array | None  # [B, P, K]; None means 0


class HypergradientCall(NamedTuple):
    """Arrays of the hypergradient preconditioner. P is the number of preconditioners per sequence."""

    k: jax.Array  # [B, T, P, K]
    beta: jax.Array | None  # [B, T, P]; None means 1
    step: jax.Array  # [B, T, P]
    log_forget: jax.Array | None  # [B, T, P]
    start: HypergradientStart
    resets: jax.Array | None  # [B, T] bool

    def tokens(self) -> HypergradientTokens:
        """Return the tokens as the recurrence reads them; of one token if the call is."""
        u = jnp.square(self.k.astype(self.step.dtype))
        return HypergradientTokens(u, self.beta, self.step, self.log_forget, self.resets)


class HypergradientOptions(NamedTuple):
    """Static options of the hypergradient preconditioner."""

    bounds: Bounds
    chunk_size: int | None
    context_axis: str | None
    write_key: bool  # return d * k in the type of k, not d


class GramCall(NamedTuple):
    """Arrays of the Gram preconditioner. P is the number of key heads."""

    k: jax.Array  # [B, T, P, K]
    log_decay: jax.Array  # [B, T, P]
    gain: jax.Array  # [B, T, P]
    center: jax.Array  # [P]
    initial: jax.Array  # [B, P, K]
    resets: jax.Array | None  # [B, T] bool


class GramOptions(NamedTuple):
    """Static options of the Gram preconditioner."""

    squash: float
    chunk_size: int | None
    context_axis: str | None
    write_key: bool  # return multiplier * k in the type of k, not the multiplier


class SquaresCall(NamedTuple):
    """Arrays of the preconditioners of squared keys. P is the number of key heads.

    `after_reset` is the public argument `restart`. Decay and gain are the same for all tokens; they are arrays since
    tokens that pad a block have a decay of 1 and a gain of 0.
    """

    k: jax.Array  # [B, T, P, K]
    log_decay: jax.Array  # [B, T, P]
    gain: jax.Array  # [B, T, P]
    initial: jax.Array  # [B, P, K]
    after_reset: jax.Array  # state at the start of every later segment [B, P, K]
    resets: jax.Array | None  # [B, T] bool


class SquaresOptions(NamedTuple):
    """Static options of the preconditioners of squared keys."""

    average: bool  # a moving average, which each token reads before its own square is added, not a sum
    normalize: bool
    chunk_size: int | None
    context_axis: str | None
    write_key: bool  # return multiplier * k in the type of k, not the multiplier
