"""The delta rule in chunks: matrix products inside a chunk, a short recurrence over chunks.

This form computes the terms of all chunks at once, for accelerators; that for a CPU is in `chunkwise_cpu`.

The notation is that of docs/mathematics.md. Arrays of one chunk are laid out [..., G, C, K] for keys (G key heads) and
[..., G, R, C, V] for values (R value heads per key head), the state [..., G, R, K, V].
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import chunkwise_cpu
from osdn_jax.ops.arguments import per_value_head
from osdn_jax.ops.calls import DeltaRuleCall
from osdn_jax.ops.checks import bounded_log
from osdn_jax.ops.chunks import fitting_chunk, from_chunks, segment_index, to_chunks
from osdn_jax.ops.scores import channel_scores, inclusive_sum, pair_decay, suffix_sum
from osdn_jax.ops.selection import default_chunk, on_cpu
from osdn_jax.ops.triangular import unit_lower_inverse


def chunk(call: DeltaRuleCall, *, erase: bool, scale: float, chunk_size: int | None) -> tuple[jax.Array, jax.Array]:
    """Run the whole sequence in chunks, in the form for this device.

    Returns:
        (outputs [B, T, H, V], final state), both in the accumulator type.
    """
    size = fitting_chunk(chunk_size or default_chunk(call), call.v.shape[1])
    if on_cpu():
        return chunkwise_cpu.chunk(call, erase=erase, scale=scale, size=size)
    batch, length, heads, _ = call.v.shape
    channel_decay = call.channel_decay
    options = ChunkOptions(scale=scale, erase=erase, channel_decay=channel_decay)

    groups = call.q.shape[2]
    if channel_decay or (call.w is not None and call.w.shape[2] != groups):
        groups = heads  # the keys differ by value head
    shared = heads // groups

    def keys(x: jax.Array) -> jax.Array:
        return to_chunks(per_value_head(x, groups, axis=2), size)

    def values(x: jax.Array) -> jax.Array:
        return to_chunks(x.reshape(batch, length, groups, shared, *x.shape[3:]), size)

    log_decay = call.log_decay
    if log_decay is not None:
        log_decay = keys(log_decay) if channel_decay else values(log_decay)

    inputs = ChunkInputs(
        q=keys(call.q),
        k=keys(call.k),
        w=None if call.w is None else keys(call.w),
        v=values(call.v),
        beta=values(call.beta),
        log_decay=log_decay,
        segment=segment_index(call.resets, size),
    )
    state = call.state.reshape(batch, groups, shared, *call.state.shape[2:])
    state, out = scan_chunks(state, inputs, options)
    return from_chunks(out, length).reshape(call.v.shape), state.reshape(call.state.shape)


class ChunkOptions(NamedTuple):
    """Static options of the chunkwise form."""

    scale: float
    erase: bool
    channel_decay: bool


class ChunkInputs(NamedTuple):
    """Inputs of one chunk; optional ones are None."""

    q: jax.Array  # [..., C, G, K]
    k: jax.Array  # [..., C, G, K]
    w: jax.Array | None  # write key [..., C, G, K]; None means k
    v: jax.Array  # [..., C, G, R, V]
    beta: jax.Array  # [..., C, G, R]
    log_decay: jax.Array | None  # [..., C, G, R], or [..., C, G, K] (then R = 1)
    segment: jax.Array | None  # [..., C] int32: number of resets since the start of the chunk


class ChunkTerms(NamedTuple):
    """Terms of a chunk that do not depend on the state."""

    q: jax.Array  # scale * q, with a decay per channel also decayed from the start of the chunk [..., G, C, K]
    k: jax.Array  # read key, decayed as q is
    w: jax.Array  # write key, with a decay per channel decayed to the end of the chunk
    from_start: jax.Array | None  # [..., G, R, C]: decay of the state from the start to each token (scalar, resets)
    to_end: jax.Array | None  # [..., G, R, C]: decay of each write to the end
    carry: jax.Array | None  # [..., G, R, 1 or K, 1]: decay of the state over the whole chunk
    inverse: jax.Array | None  # (I + A)^-1 [..., G, R, C, C]
    scores: jax.Array  # P [..., G, R, C, C]
    v: jax.Array  # [..., G, R, C, V]
    beta: jax.Array  # [..., G, R, C]


def chunk_terms(inputs: ChunkInputs, options: ChunkOptions) -> ChunkTerms:
    """Compute the terms of a chunk that do not depend on the state, in parallel over chunks."""
    dtype = inputs.beta.dtype
    q, k, w = (
        x.astype(dtype).swapaxes(-2, -3) for x in (inputs.q, inputs.k, inputs.k if inputs.w is None else inputs.w)
    )
    q = q * options.scale
    log_decay = None if inputs.log_decay is None else bounded_log(inputs.log_decay)
    v = jnp.moveaxis(inputs.v.astype(dtype), -4, -2)
    beta = jnp.moveaxis(inputs.beta, -3, -1)

    x = jnp.stack([k, q], axis=-3) if options.erase else q[..., None, :, :]
    from_start = to_end = carry = None
    if options.channel_decay and log_decay is not None:
        g = log_decay.swapaxes(-2, -3)
        scores = channel_scores(x, w, g)[..., None, :, :]  # [..., G, M, 1, C, C]
        decay = jnp.exp(inclusive_sum(g))
        q, k, w = q * decay, k * decay, w * jnp.exp(suffix_sum(g))
        carry = decay[..., None, -1, :, None]
    else:
        scores = jnp.einsum("...mik,...jk->...mij", x, w)[..., None, :, :]
        if log_decay is None:
            scores = jnp.tril(scores)
        else:
            g = jnp.moveaxis(log_decay, -3, -1)
            scores = scores * pair_decay(g)[..., None, :, :, :]
            from_start = jnp.exp(inclusive_sum(g[..., None])[..., 0])
            to_end = jnp.exp(suffix_sum(g[..., None])[..., 0])
            carry = from_start[..., -1:, None]
    if inputs.segment is not None:
        segment = inputs.segment
        same = segment[..., :, None] == segment[..., None, :]
        scores = scores * same[..., None, None, None, :, :].astype(scores.dtype)
        first = (segment == 0)[..., None, None, :].astype(scores.dtype)
        last = (segment == segment[..., -1:])[..., None, None, :].astype(scores.dtype)
        from_start = first if from_start is None else from_start * first
        to_end = last if to_end is None else to_end * last
        carry = first[..., -1:, None] if carry is None else carry * first[..., -1:, None]

    inverse = None
    if options.erase:
        lower = beta[..., None] * jnp.tril(scores[..., 0, :, :, :], -1)
        inverse = unit_lower_inverse(lower)
    scores = jnp.broadcast_to(scores[..., -1, :, :, :], (*beta.shape, beta.shape[-1]))
    return ChunkTerms(q, k, w, from_start, to_end, carry, inverse, scores, v, beta)


def advance_chunk(state: jax.Array, terms: ChunkTerms) -> tuple[jax.Array, jax.Array]:
    """Advance the state [..., G, R, K, V] over a chunk: (state after it, outputs [..., C, G, R, V])."""
    residual = terms.v
    if terms.inverse is not None:
        recalled = jnp.einsum("...gik,...grkv->...griv", terms.k, state)
        if terms.from_start is not None:
            recalled = terms.from_start[..., None] * recalled
        residual = residual - recalled
    write = terms.beta[..., None] * residual
    if terms.inverse is not None:
        write = terms.inverse @ write
    read = jnp.einsum("...gik,...grkv->...griv", terms.q, state)
    if terms.from_start is not None:
        read = terms.from_start[..., None] * read
    out = read + terms.scores @ write
    if terms.to_end is not None:
        write = terms.to_end[..., None] * write
    kept = state if terms.carry is None else terms.carry * state
    state = kept + jnp.einsum("...gjk,...grjv->...grkv", terms.w, write)
    return state, jnp.moveaxis(out, -2, -4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scan_chunks(state: jax.Array, inputs: ChunkInputs, options: ChunkOptions) -> tuple[jax.Array, jax.Array]:
    """Scan over chunks; inputs lead with [N, B]: state [B, G, R, K, V] -> (final, outputs [N, B, C, G, R, V])."""
    final, (out, _) = _forward(state, inputs, options)
    return final, out


def _forward(
    state: jax.Array, inputs: ChunkInputs, options: ChunkOptions
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Return (final state, (outputs, state before each chunk))."""

    def step(state: jax.Array, terms: ChunkTerms) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        after, out = advance_chunk(state, terms)
        return after, (out, state)

    return lax.scan(step, state, chunk_terms(inputs, options))


def _scan_fwd(state: jax.Array, inputs: ChunkInputs, options: ChunkOptions) -> tuple[Any, Any]:
    final, (out, states) = _forward(state, inputs, options)
    return (final, out), (inputs, states)


def _scan_bwd(options: ChunkOptions, saved: Any, cotangents: Any) -> Any:
    # Only the state before each chunk was saved; the rest of a chunk is recomputed.
    inputs, states = saved
    d_state, d_out = cotangents

    def step(d_state: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
        state, terms, d_out = chunk
        _, pull = jax.vjp(advance_chunk, state, terms)
        return pull((d_state, d_out))

    terms, pull_terms = jax.vjp(lambda x: chunk_terms(x, options), inputs)
    d_state, d_terms = lax.scan(step, d_state, (states, terms, d_out), reverse=True)
    return d_state, *pull_terms(d_terms)


scan_chunks.defvjp(_scan_fwd, _scan_bwd)
