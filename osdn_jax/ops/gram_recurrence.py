"""The recurrence of the Gram preconditioner: as a scan, in chunks, and for a sequence that is split over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from osdn_jax.ops import sequence_parallel
from osdn_jax.ops.arguments import scaled
from osdn_jax.ops.calls import GramCall, GramOptions
from osdn_jax.ops.channels import over_channels
from osdn_jax.ops.chunks import fitting_chunk, from_chunks, segment_index, to_chunks
from osdn_jax.ops.scores import pair_decay
from osdn_jax.ops.selection import DEFAULT_PRECONDITIONER_CHUNK
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

    def step(a: jax.Array, token: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        a = _advance(a, *token)
        return a, a

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (_update(call), call.log_decay, call.resets))
    final, running = loop(step, call.initial, tokens)
    return _output(jnp.moveaxis(running, 0, 1), call, options), final


def by_loop(call: GramCall, options: GramOptions) -> tuple[jax.Array, jax.Array]:
    """Run one token at a time with `loop_tokens`; arguments and results as `by_scan`."""
    if call.k.size == 0:
        return by_scan(call, options)

    def step(a: jax.Array, token: GramCall, center: jax.Array, reset: jax.Array | None) -> Any:
        a = _advance(a, _update(token), token.log_decay, reset)
        return a, _output(a, token._replace(center=center), options)

    tokens = call._replace(center=None, initial=None, resets=None)  # type: ignore[arg-type]  # what a token reads
    return loop_tokens(step, call.initial, tokens, call.center, call.resets)


def by_chunks(call: GramCall, options: GramOptions) -> tuple[jax.Array, jax.Array]:
    """Run in chunks, with sums as products with a matrix of decays; arguments and results as `by_scan`."""
    length = call.k.shape[1]
    size = fitting_chunk(options.chunk_size or DEFAULT_PRECONDITIONER_CHUNK, length)

    def step(a: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        update, log_decay, segment = chunk
        decay = pair_decay(log_decay.swapaxes(1, 2))  # [B, P, C, C]
        from_start = decay[..., :, 0] * jnp.exp(log_decay[:, 0])[..., None]
        if segment is not None:
            same = segment[:, None, :, None] == segment[:, None, None, :]
            decay = jnp.where(same, decay, 0.0)
            from_start = jnp.where((segment == 0)[:, None, :], from_start, 0.0)
        running = jnp.einsum("bpij,bjpk->bipk", decay, update)
        running = running + from_start.swapaxes(1, 2)[..., None] * a[:, None]
        return running[:, -1], running

    chunks = (to_chunks(_update(call), size), to_chunks(call.log_decay, size), segment_index(call.resets, size))
    # The gradient recomputes the decays inside a chunk; saved, they would be larger than the inputs.
    final, running = lax.scan(jax.checkpoint(step), call.initial, chunks)
    return _output(from_chunks(running, length), call, options), final


def _advance(a: jax.Array, update: jax.Array, log_decay: jax.Array, reset: jax.Array | None) -> jax.Array:
    if reset is not None:
        a = jnp.where(reset[:, None, None], 0.0, a)
    return over_channels(jnp.exp(log_decay), a.shape[-1]) * a + update


def _update(call: GramCall) -> jax.Array:
    return over_channels(call.gain, call.k.shape[-1]) * jnp.square(call.k.astype(call.gain.dtype))


def _output(running: jax.Array, call: GramCall, options: GramOptions) -> jax.Array:
    center = over_channels(call.center, running.shape[-1])
    r = jnp.log(running + _EPSILON) - center.reshape((1,) * (running.ndim - 2) + center.shape)
    multiplier = jnp.exp(-float(np.log(options.squash)) * r / (1.0 + jnp.abs(r)))
    return scaled(call.k, multiplier) if options.write_key else multiplier


def state_before(call: GramCall, axis: str) -> jax.Array:
    """Return A before this device's tokens, from the total decay and the sum of squares of every preceding device.

    Tokens before a reset are left out of the sums, not multiplied by zero, since they may not be finite.
    """
    log_decay, resets = call.log_decay, call.resets
    # The sum over later tokens, not a difference of sums: that would lose all digits near a full reset.
    later = jnp.pad(log_decay[:, 1:], ((0, 0), (0, 1), (0, 0)))[:, : log_decay.shape[1]]
    weights = jnp.exp(lax.cumsum(later, axis=1, reverse=True)) * call.gain
    squares = jnp.square(call.k.astype(call.gain.dtype))
    any_reset = None
    if resets is not None:
        segment, any_reset = jnp.cumsum(resets.astype(jnp.int32), axis=1), jnp.any(resets, axis=1)
        last = (segment == segment[:, -1:])[..., None]
        weights = jnp.where(last, weights, 0.0)
        squares = jnp.where(last[..., None], squares, 0.0)
    total_decay = jnp.exp(jnp.sum(sequence_parallel.zero_rows(any_reset, log_decay), axis=1))
    added = jnp.einsum("btp,btpk->bpk", weights, squares)

    def after(summary: Any, a: jax.Array) -> jax.Array:
        total_decay, added, any_reset = summary
        kept = total_decay[..., None] * sequence_parallel.zero_rows(any_reset, a)
        return sequence_parallel.zero_rows(any_reset, kept) + added

    return sequence_parallel.state_before(after, (total_decay, added, any_reset), call.initial, axis)
