"""The delta rule in chunks: matrix products inside a chunk, one small recurrence from chunk to chunk.

Notation of docs/mathematics.md. Arrays of one chunk are laid out [..., G, C, K] for keys (G key heads) and
[..., G, R, C, V] for values (R value heads read each key head), the memory [..., G, R, K, V].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops.arguments import Call
from osdn_jax.ops.checks import bounded_log
from osdn_jax.ops.recurrence import per_value_head
from osdn_jax.ops.scores import channel_scores, inclusive_sum, pair_decay, suffix_sum
from osdn_jax.ops.selection import default_chunk, on_cpu
from osdn_jax.ops.tiling import documents, fitting_chunk, from_chunks, to_chunks
from osdn_jax.ops.triangular import unit_lower_inverse


def chunk(call: Call, *, erase: bool, scale: float, chunk_size: int | None) -> tuple[jax.Array, jax.Array]:
    """The whole sequence in chunks: (outputs [B, T, H, V], final memory), both in the accumulator type."""
    batch, length, heads, _ = call.v.shape
    channel_decay = call.log_decay is not None and call.log_decay.ndim == 4
    size = fitting_chunk(chunk_size or default_chunk(channel_decay), length)
    options = Options(scale=scale, erase=erase, channel_decay=channel_decay, hoist=not on_cpu())

    groups = call.q.shape[2]
    if channel_decay or (call.w is not None and call.w.shape[2] != groups):
        groups = heads  # the keys differ by value head anyway
    shared = heads // groups

    def keys(x: jax.Array) -> jax.Array:
        return to_chunks(per_value_head(x, groups, axis=2), size)

    def values(x: jax.Array) -> jax.Array:
        return to_chunks(x.reshape(batch, length, groups, shared, *x.shape[3:]), size)

    log_decay = call.log_decay
    if log_decay is not None:
        log_decay = keys(log_decay) if channel_decay else values(log_decay)

    inputs = Inputs(
        q=keys(call.q),
        k=keys(call.k),
        w=None if call.w is None else keys(call.w),
        v=values(call.v),
        beta=values(call.beta),
        log_decay=log_decay,
        document=documents(call.restarts, size),
    )
    memory = call.memory.reshape(batch, groups, shared, *call.memory.shape[2:])
    memory, out = chunked(memory, inputs, options)
    return from_chunks(out, length).reshape(call.v.shape), memory.reshape(call.memory.shape)


class Options(NamedTuple):
    """What is static in a call."""

    scale: float
    erase: bool
    channel_decay: bool
    hoist: bool  # prepare all chunks at once before the recurrence (accelerators) or each inside it (CPU caches)


class Inputs(NamedTuple):
    """One chunk; optional parts are None."""

    q: jax.Array  # [..., C, G, K]
    k: jax.Array  # [..., C, G, K]
    w: jax.Array | None  # [..., C, G, K]; None where it is k
    v: jax.Array  # [..., C, G, R, V]
    beta: jax.Array  # [..., C, G, R]
    log_decay: jax.Array | None  # [..., C, G, R], or [..., C, G, K] (then R = 1)
    document: jax.Array | None  # [..., C] int32: how often the memory has restarted since the start of the chunk


class Prepared(NamedTuple):
    """All of a chunk that does not need the memory."""

    q: jax.Array  # scale * q, decayed from the start of the chunk where decay is per channel [..., G, C, K]
    k: jax.Array  # likewise
    w: jax.Array  # decayed to the end of the chunk where decay is per channel
    from_start: jax.Array | None  # [..., G, R, C]: what of the memory is left at each token (scalar decay, restarts)
    to_end: jax.Array | None  # [..., G, R, C]: what of each write is left at the end
    carry: jax.Array | None  # [..., G, R, 1 or K, 1]: what of the memory is left at the end
    inverse: jax.Array | None  # (I + A)^-1 [..., G, R, C, C]
    scores: jax.Array  # P [..., G, R, C, C]
    v: jax.Array  # [..., G, R, C, V]
    beta: jax.Array  # [..., G, R, C]


def prepare(inputs: Inputs, options: Options) -> Prepared:
    """The part of a chunk that runs in parallel over chunks."""
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
    if inputs.document is not None:
        document = inputs.document
        same = document[..., :, None] == document[..., None, :]
        scores = scores * same[..., None, None, None, :, :].astype(scores.dtype)
        first = (document == 0)[..., None, None, :].astype(scores.dtype)
        last = (document == document[..., -1:])[..., None, None, :].astype(scores.dtype)
        from_start = first if from_start is None else from_start * first
        to_end = last if to_end is None else to_end * last
        carry = first[..., -1:, None] if carry is None else carry * first[..., -1:, None]

    inverse = None
    if options.erase:
        lower = beta[..., None] * jnp.tril(scores[..., 0, :, :, :], -1)
        inverse = unit_lower_inverse(lower)
    scores = jnp.broadcast_to(scores[..., -1, :, :, :], (*beta.shape, beta.shape[-1]))
    return Prepared(q, k, w, from_start, to_end, carry, inverse, scores, v, beta)


def advance(memory: jax.Array, p: Prepared) -> tuple[jax.Array, jax.Array]:
    """One chunk of the recurrence: the memory [..., G, R, K, V] -> (memory after it, outputs [..., C, G, R, V])."""
    residual = p.v
    if p.inverse is not None:
        recalled = jnp.einsum("...gik,...grkv->...griv", p.k, memory)
        if p.from_start is not None:
            recalled = p.from_start[..., None] * recalled
        residual = residual - recalled
    write = p.beta[..., None] * residual
    if p.inverse is not None:
        write = p.inverse @ write
    read = jnp.einsum("...gik,...grkv->...griv", p.q, memory)
    if p.from_start is not None:
        read = p.from_start[..., None] * read
    out = read + p.scores @ write
    if p.to_end is not None:
        write = p.to_end[..., None] * write
    kept = memory if p.carry is None else p.carry * memory
    memory = kept + jnp.einsum("...gjk,...grjv->...grkv", p.w, write)
    return memory, jnp.moveaxis(out, -2, -4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def chunked(memory: jax.Array, inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """All chunks. inputs lead with [N, B]; memory [B, G, R, K, V] -> (final memory, outputs [N, B, C, G, R, V])."""
    final, (out, _) = _forward(memory, inputs, options)
    return final, out


def _forward(memory: jax.Array, inputs: Inputs, options: Options) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(final memory, (outputs, memory before each chunk))."""
    advance_chunk = _advance_chunk(options)

    def step(memory: jax.Array, chunk: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        after, out = advance_chunk(memory, chunk)
        return after, (out, memory)

    return lax.scan(step, memory, prepare(inputs, options) if options.hoist else inputs)


def _advance_chunk(options: Options) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The step of the recurrence: over chunks that are prepared already, or preparing each as it comes."""
    return advance if options.hoist else lambda memory, chunk: advance(memory, prepare(chunk, options))


def _chunked_fwd(memory: jax.Array, inputs: Inputs, options: Options) -> tuple[Any, Any]:
    final, (out, memories) = _forward(memory, inputs, options)
    return (final, out), (inputs, memories)


def _chunked_bwd(options: Options, saved: Any, cotangents: Any) -> Any:
    # Only the memory before each chunk was kept: what happens inside a chunk is computed again.
    inputs, memories = saved
    d_memory, d_out = cotangents
    advance_chunk = _advance_chunk(options)

    def step(d_memory: jax.Array, chunk: Any) -> tuple[jax.Array, Any]:
        memory, chunk, d_out = chunk
        _, pull = jax.vjp(advance_chunk, memory, chunk)
        return pull((d_memory, d_out))

    if not options.hoist:
        return lax.scan(step, d_memory, (memories, inputs, d_out), reverse=True)
    prepared, pull_prepare = jax.vjp(lambda x: prepare(x, options), inputs)
    d_memory, d_prepared = lax.scan(step, d_memory, (memories, prepared, d_out), reverse=True)
    return d_memory, *pull_prepare(d_prepared)


chunked.defvjp(_chunked_fwd, _chunked_bwd)
