"""The recurrence of the preconditioners of squared keys: as a scan, in chunks, and split over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import decayed_sum
from osdn_jax.ops.arguments import scaled
from osdn_jax.ops.calls import SquaresCall, SquaresOptions
from osdn_jax.ops.channels import over_channels
from osdn_jax.ops.token_loop import loop_tokens

_EPSILON = 1e-6


def by_scan(
    call: SquaresCall, options: SquaresOptions, loop: Callable[..., Any] = lax.scan
) -> tuple[jax.Array, jax.Array]:
    """Run the specification, one token at a time.

    Args:
        call: checked arrays.
        options: static options.
        loop: `lax.scan`, or a function with the same arguments (step, carry, tokens) and result.

    Returns:
        (multiplier, or write keys if options.write_key, [B, T, P, K]; the sum after the last token [B, P, K]).
    """
    running, final = decayed_sum.by_scan(*_sums(call), loop)
    return _output(_read(running, call, options), call.k, options), final


def by_chunks(call: SquaresCall, options: SquaresOptions) -> tuple[jax.Array, jax.Array]:
    """Run in chunks, with sums as products with a matrix of decays; arguments and results as `by_scan`."""
    running, final = decayed_sum.by_chunks(*_sums(call), options.chunk_size)
    return _output(_read(running, call, options), call.k, options), final


def by_loop(call: SquaresCall, options: SquaresOptions) -> tuple[jax.Array, jax.Array]:
    """Run one token at a time with `loop_tokens`; arguments and results as `by_scan`."""
    if call.k.size == 0:
        return by_scan(call, options)

    def step(before: jax.Array, token: SquaresCall, after_reset: jax.Array, reset: jax.Array | None) -> Any:
        if reset is not None:
            before = jnp.where(reset[:, None, None], after_reset, before)
        after = decayed_sum.advance(before, _update(token), token.log_decay, None)
        return after, _output(before if options.average else after, token.k, options)

    tokens = call._replace(initial=None, after_reset=None, resets=None)  # type: ignore[arg-type]  # what a token reads
    return loop_tokens(step, call.initial, tokens, call.after_reset, call.resets)


def state_before(call: SquaresCall, axis: str) -> jax.Array:
    """Return the sum before this device's tokens, from those of every preceding device."""
    return decayed_sum.state_before(*_sums(call), axis)


def _sums(call: SquaresCall) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the arguments of `decayed_sum`; the start of a later segment is part of its first token's update."""
    update, resets = _update(call), call.resets
    if resets is not None:
        decay = over_channels(jnp.exp(call.log_decay), call.k.shape[-1])
        update = update + jnp.where(resets[..., None, None], decay * call.after_reset[:, None], 0.0)
    return update, call.log_decay, call.initial, resets


def _update(call: SquaresCall) -> jax.Array:
    return over_channels(call.gain, call.k.shape[-1]) * jnp.square(call.k.astype(call.gain.dtype))


def _read(running: jax.Array, call: SquaresCall, options: SquaresOptions) -> jax.Array:
    """Return what each token reads: the sum after it, or the average before it."""
    if not options.average:
        return running
    before = jnp.concatenate([call.initial[:, None], running], axis=1)[:, :-1]
    if call.resets is None:
        return before
    return jnp.where(call.resets[..., None, None], call.after_reset[:, None], before)


def _output(read: jax.Array, k: jax.Array, options: SquaresOptions) -> jax.Array:
    multiplier = 1.0 / (read + (_EPSILON if options.average else 1.0))
    if options.normalize:
        squares = jnp.square(k.astype(multiplier.dtype))
        multiplier = multiplier / (jnp.sum(multiplier * squares, axis=-1, keepdims=True) + _EPSILON)
    return scaled(k, multiplier) if options.write_key else multiplier
