"""The recurrence of the Gram preconditioner: as a scan, in chunks, and for a sequence that is split over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from osdn_jax.ops import decayed_sum
from osdn_jax.ops.arguments import scaled
from osdn_jax.ops.calls import GramCall, GramOptions
from osdn_jax.ops.channels import over_channels
from osdn_jax.ops.token_loop import loop_tokens

_EPSILON = 1e-6


def by_scan(call: GramCall, options: GramOptions, loop: Callable[..., Any] = lax.scan) -> tuple[jax.Array, jax.Array]:
    """Run the specification, one token at a time.

    Args:
        call: checked arrays.
        options: static options.
        loop: `lax.scan`, or a function with the same arguments (step, carry, tokens) and result.

    Returns:
        (multiplier, or write keys if options.write_key, [B, T, P, K]; A after the last token [B, P, K]).
    """
    running, final = decayed_sum.by_scan(_update(call), call.log_decay, call.initial, call.resets, loop)
    return _output(running, call, options), final


def by_loop(call: GramCall, options: GramOptions) -> tuple[jax.Array, jax.Array]:
    """Run one token at a time with `loop_tokens`; arguments and results as `by_scan`."""
    if call.k.size == 0:
        return by_scan(call, options)

    def step(a: jax.Array, token: GramCall, center: jax.Array, reset: jax.Array | None) -> Any:
        a = decayed_sum.advance(a, _update(token), token.log_decay, reset)
        return a, _output(a, token._replace(center=center), options)

    tokens = call._replace(center=None, initial=None, resets=None)  # type: ignore[arg-type]  # what a token reads
    return loop_tokens(step, call.initial, tokens, call.center, call.resets)


def by_chunks(call: GramCall, options: GramOptions) -> tuple[jax.Array, jax.Array]:
    """Run in chunks, with sums as products with a matrix of decays; arguments and results as `by_scan`."""
    sums = (_update(call), call.log_decay, call.initial, call.resets)
    running, final = decayed_sum.by_chunks(*sums, options.chunk_size)
    return _output(running, call, options), final


def state_before(call: GramCall, axis: str) -> jax.Array:
    """Return A before this device's tokens, from those of every preceding device."""
    return decayed_sum.state_before(_update(call), call.log_decay, call.initial, call.resets, axis)


def _update(call: GramCall) -> jax.Array:
    return over_channels(call.gain, call.k.shape[-1]) * jnp.square(call.k.astype(call.gain.dtype))


def _output(running: jax.Array, call: GramCall, options: GramOptions) -> jax.Array:
    center = over_channels(call.center, running.shape[-1])
    r = jnp.log(running + _EPSILON) - center.reshape((1,) * (running.ndim - 2) + center.shape)
    multiplier = jnp.exp(-float(np.log(options.squash)) * r / (1.0 + jnp.abs(r)))
    return scaled(call.k, multiplier) if options.write_key else multiplier
