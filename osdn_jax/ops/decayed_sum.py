"""A decayed running sum per key channel, A_t = exp(log_decay_t) A_{t-1} + update_t, reset to zeros between segments.

The preconditioners of running sums are built on it: as a scan, in chunks, and for a sequence split over devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import sequence_parallel
from osdn_jax.ops.channels import over_channels
from osdn_jax.ops.chunks import fitting_chunk, from_chunks, segment_index, to_chunks
from osdn_jax.ops.scores import pair_decay
from osdn_jax.ops.selection import DEFAULT_PRECONDITIONER_CHUNK


def advance(a: jax.Array, update: jax.Array, log_decay: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Return A after one token: a and update [B, P, K], log_decay [B, P], reset [B] bool or None."""
    if reset is not None:
        a = jnp.where(reset[:, None, None], 0.0, a)
    return over_channels(jnp.exp(log_decay), a.shape[-1]) * a + update


def by_scan(
    update: jax.Array,
    log_decay: jax.Array,
    initial: jax.Array,
    resets: jax.Array | None,
    loop: Callable[..., Any] = lax.scan,
) -> tuple[jax.Array, jax.Array]:
    """Run one token at a time, the specification.

    Args:
        update: [B, T, P, K].
        log_decay: [B, T, P].
        initial: A before the first token, [B, P, K].
        resets: [B, T] bool or None.
        loop: `lax.scan`, or a function with the same arguments (step, carry, tokens) and result.

    Returns:
        (A after each token [B, T, P, K], A after the last one [B, P, K]).
    """

    def step(a: jax.Array, token: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        a = advance(a, *token)
        return a, a

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (update, log_decay, resets))
    final, running = loop(step, initial, tokens)
    return jnp.moveaxis(running, 0, 1), final


def by_chunks(
    update: jax.Array, log_decay: jax.Array, initial: jax.Array, resets: jax.Array | None, chunk_size: int | None
) -> tuple[jax.Array, jax.Array]:
    """Run in chunks, with sums as products with a matrix of decays; arguments and results as `by_scan`."""
    length = update.shape[1]
    size = fitting_chunk(chunk_size or DEFAULT_PRECONDITIONER_CHUNK, length)

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

    chunks = (to_chunks(update, size), to_chunks(log_decay, size), segment_index(resets, size))
    # The gradient recomputes the decays inside a chunk; saved, they would be larger than the inputs.
    final, running = lax.scan(jax.checkpoint(step), initial, chunks)
    return from_chunks(running, length), final


def state_before(
    update: jax.Array, log_decay: jax.Array, initial: jax.Array, resets: jax.Array | None, axis: str
) -> jax.Array:
    """Return A before this device's tokens, from the total decay and the sum of updates of every preceding device.

    Tokens before a reset are left out of the sums, not multiplied by zero, since they may not be finite.

    Args:
        update: this device's part, [B, T, P, K].
        log_decay: this device's part, [B, T, P].
        initial: A before the first device's tokens, [B, P, K].
        resets: this device's part, [B, T] bool or None.
        axis: mesh axis that the sequence is split over.
    """
    # The sum over later tokens, not a difference of sums: that would lose all digits near a full reset.
    later = jnp.pad(log_decay[:, 1:], ((0, 0), (0, 1), (0, 0)))[:, : log_decay.shape[1]]
    weights = jnp.exp(lax.cumsum(later, axis=1, reverse=True))
    any_reset = None
    if resets is not None:
        segment, any_reset = jnp.cumsum(resets.astype(jnp.int32), axis=1), jnp.any(resets, axis=1)
        last = (segment == segment[:, -1:])[..., None]
        weights = jnp.where(last, weights, 0.0)
        update = jnp.where(last[..., None], update, 0.0)
    total_decay = jnp.exp(jnp.sum(sequence_parallel.zero_rows(any_reset, log_decay), axis=1))
    added = jnp.einsum("btp,btpk->bpk", weights, update)

    def after(summary: Any, a: jax.Array) -> jax.Array:
        total_decay, added, any_reset = summary
        kept = total_decay[..., None] * sequence_parallel.zero_rows(any_reset, a)
        return sequence_parallel.zero_rows(any_reset, kept) + added

    return sequence_parallel.state_before(after, (total_decay, added, any_reset), initial, axis)
