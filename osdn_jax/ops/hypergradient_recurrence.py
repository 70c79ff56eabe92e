"""The recurrence of the hypergradient preconditioner: as a scan, and in chunks with exact projection.

Without the projection the recurrence is a delta rule with key k^2 and a one-dimensional value, so a chunk is one
triangular solve and two products. The first value to leave the bounds in a chunk depends on exact values only. So if no
value leaves the bounds the chunk is exact; otherwise it is recomputed with the scan.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from osdn_jax.ops import sequence_parallel
from osdn_jax.ops.arguments import scaled
from osdn_jax.ops.calls import (
    Bounds,
    HypergradientCall,
    HypergradientOptions,
    HypergradientStart,
    HypergradientTokens,
)
from osdn_jax.ops.channels import channel_sum, over_channels
from osdn_jax.ops.chunks import fitting_chunk, from_chunks, to_chunks
from osdn_jax.ops.scores import pair_decay
from osdn_jax.ops.selection import DEFAULT_PRECONDITIONER_CHUNK
from osdn_jax.ops.token_loop import loop_tokens
from osdn_jax.ops.triangular import unit_lower_inverse


def by_scan(
    call: HypergradientCall, options: HypergradientOptions, loop: Callable[..., Any] = lax.scan
) -> tuple[jax.Array, jax.Array]:
    """Run the specification, one token at a time.

    Args:
        call: checked arrays.
        options: static options.
        loop: `lax.scan`, or a function with the same arguments (step, carry, tokens) and result.

    Returns:
        (d before each token, or write keys if options.write_key, [B, T, P, K]; d after the last token [B, P, K]).
    """
    final, d = scan_tokens(call.start.initial, call.tokens(), call.start, options.bounds, loop)
    return scaled(call.k, d) if options.write_key else d, final


def by_loop(call: HypergradientCall, options: HypergradientOptions) -> tuple[jax.Array, jax.Array]:
    """Run one token at a time with `loop_tokens`; arguments and results as `by_scan`."""
    if call.k.size == 0:
        return by_scan(call, options)

    def step(d: jax.Array, token: HypergradientCall, start: HypergradientStart, reset: jax.Array | None) -> Any:
        d, used = advance_token(d, token._replace(resets=reset).tokens(), start, options.bounds)
        return d, scaled(token.k, used) if options.write_key else used

    # Only what tokens read: the gradient of a constant is a sum over all of them.
    after_reset: Any = None if call.resets is None else call.start.after_reset
    constants = HypergradientStart(initial=None, after_reset=after_reset, anchor=call.start.anchor)  # type: ignore[arg-type]
    tokens = call._replace(start=None, resets=None)  # type: ignore[arg-type]
    return loop_tokens(step, call.start.initial, tokens, constants, call.resets)


def by_chunks(call: HypergradientCall, options: HypergradientOptions) -> tuple[jax.Array, jax.Array]:
    """Run in chunks; arguments and results as `by_scan`."""
    length = call.k.shape[1]
    size = fitting_chunk(options.chunk_size or DEFAULT_PRECONDITIONER_CHUNK, length)
    chunks = jax.tree.map(lambda x: to_chunks(x, size), call.tokens())
    final, d = scan_projected_chunks(call.start.initial, chunks, call.start, options.bounds)
    d = from_chunks(d, length)
    return scaled(call.k, d) if options.write_key else d, final


def advance_token(
    d: jax.Array, token: HypergradientTokens, start: HypergradientStart, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """Compute one token of the specification: d [B, P, K] -> (d after the token, d that the token uses)."""
    if token.reset is not None:
        d = jnp.where(token.reset[:, None, None], start.after_reset, d)
    predicted = channel_sum(d * token.u)
    feedback = 1.0 - (predicted if token.beta is None else token.beta * predicted)
    after = d
    if token.log_forget is not None:
        forget = over_channels(jnp.exp(token.log_forget), d.shape[-1])
        after = forget * after
        if start.anchor is not None:
            after = after - over_channels(jnp.expm1(token.log_forget), d.shape[-1]) * start.anchor
    after = after + over_channels(token.step * feedback, token.u.shape[-1]) * token.u
    return project(after, bounds), d


def project(d: jax.Array, bounds: Bounds) -> jax.Array:
    """Clip to the bounds. The gradient of a value on a bound passes whole; jnp.clip would halve it."""
    if bounds is None:
        return d
    lo, hi = (jnp.asarray(x, d.dtype) for x in bounds)
    return jnp.where(d < lo, lo, jnp.where(d > hi, hi, d))


def scan_tokens(
    d: jax.Array,
    tokens: HypergradientTokens,
    start: HypergradientStart,
    bounds: Bounds,
    loop: Callable[..., Any] = lax.scan,
) -> tuple[jax.Array, jax.Array]:
    """Scan over [B, T, ...] tokens from d [B, P, K]: (final d, d before each token [B, T, P, K])."""
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final, used = loop(lambda d, token: advance_token(d, token, start, bounds), d, tokens)
    return final, jnp.moveaxis(used, 0, 1)


def affine_chunk(d: jax.Array, tokens: HypergradientTokens, start: HypergradientStart) -> tuple[jax.Array, jax.Array]:
    """Compute a chunk without the projection: d [B, P, K], [B, C, ...] tokens -> (d after it, d before each token)."""
    u = tokens.u.swapaxes(1, 2)  # [B, P, C, K]
    step = tokens.step.swapaxes(1, 2)
    size, dtype = u.shape[2], u.dtype
    decay, earlier = _decay(tokens)
    from_start = jnp.ones((1, 1, size + 1), dtype)  # decay from the segment's initial state to each token
    first = None
    if tokens.reset is not None:
        segment = jnp.cumsum(tokens.reset.astype(jnp.int32), axis=1)
        segment = jnp.concatenate([segment, segment[:, -1:]], axis=1)
        same = (segment[:, :, None] == segment[:, None, :-1])[:, None].astype(dtype)
        first = (segment == 0)[:, None, :, None]
        decay, earlier = decay * same, earlier * same
    if tokens.log_forget is not None:
        from_start = jnp.exp(jnp.sum(earlier * tokens.log_forget.swapaxes(1, 2)[:, :, None, :], axis=-1))

    after_reset = start.after_reset if start.anchor is None else start.after_reset - start.anchor
    origin = d if start.anchor is None else d - start.anchor  # the recurrence is linear in d - anchor
    origin = origin[:, :, None, :]
    if first is not None:
        origin = jnp.where(first, origin, after_reset[:, :, None, :])
    origin = from_start[..., None] * origin  # [B, P, C + 1 or 1, K]

    predicted = jnp.sum(u * (origin[:, :, :-1] if origin.shape[2] > 1 else origin), axis=-1)
    if start.anchor is not None:
        predicted = predicted + jnp.sum(u * start.anchor[:, :, None, :], axis=-1)
    if tokens.beta is not None:
        predicted = tokens.beta.swapaxes(1, 2) * predicted
    feedback = jnp.einsum("bpij,bpj->bpi", unit_lower_inverse(_lower(tokens, decay)), 1.0 - predicted)
    values = origin + jnp.einsum("bpij,bpjk->bpik", decay, (step * feedback)[..., None] * u)
    if start.anchor is not None:
        values = values + start.anchor[:, :, None, :]
    return values[:, :, -1], values[:, :, :-1].swapaxes(1, 2)


def transition(tokens: HypergradientTokens, chunk_size: int = 64) -> jax.Array:
    """Return M [B, P, K, K] such that the state after [B, T, ...] tokens is M d + N, without the projection."""
    batch, length, heads, key_dim = tokens.u.shape
    size, dtype = fitting_chunk(chunk_size, length), tokens.u.dtype

    def step(matrix: jax.Array, chunk: HypergradientTokens) -> tuple[jax.Array, None]:
        u, step = chunk.u.swapaxes(1, 2), chunk.step.swapaxes(1, 2)
        decay, earlier = _decay(chunk)
        from_start = jnp.ones((1, 1, size + 1), dtype)
        if chunk.log_forget is not None:
            from_start = jnp.exp(jnp.sum(earlier * chunk.log_forget.swapaxes(1, 2)[:, :, None, :], axis=-1))
        predicted = from_start[:, :, :-1, None] * jnp.einsum("bpik,bpkj->bpij", u, matrix)
        if chunk.beta is not None:
            predicted = chunk.beta.swapaxes(1, 2)[..., None] * predicted
        feedback = jnp.einsum("bpij,bpjk->bpik", unit_lower_inverse(_lower(chunk, decay)), predicted)
        write = (decay[:, :, -1] * step)[..., None] * u
        return from_start[:, :, -1, None, None] * matrix - jnp.einsum("bpik,bpij->bpkj", write, feedback), None

    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=dtype), (batch, heads, key_dim, key_dim))
    identity = sequence_parallel.vary(identity, sequence_parallel.axes_of(tokens))
    matrix, _ = lax.scan(step, identity, jax.tree.map(lambda x: to_chunks(x, size), tokens._replace(reset=None)))
    if tokens.reset is None:
        return matrix
    return jnp.where(jnp.any(tokens.reset, axis=1)[:, None, None, None], 0.0, matrix)


def _decay(tokens: HypergradientTokens) -> tuple[jax.Array, jax.Array]:
    """Return the decay from the write of token j to just before token i, and the mask j < i (1 or 0).

    Their shapes are [B or 1, P or 1, C + 1, C] and [1, 1, C + 1, C]; the last row is the decay after all tokens.
    """
    size, dtype = tokens.u.shape[1], tokens.u.dtype
    earlier = jnp.asarray(np.tril(np.ones((size + 1, size)), -1), dtype)[None, None]
    if tokens.log_forget is None:
        return earlier, earlier
    return jnp.pad(pair_decay(tokens.log_forget.swapaxes(1, 2)), ((0, 0), (0, 0), (1, 0), (0, 0))), earlier


def _lower(tokens: HypergradientTokens, decay: jax.Array) -> jax.Array:
    """Return L [B, P, C, C] in (I + L) feedback = 1 - beta <d, u>, with d the state at the chunk's start, decayed."""
    u = tokens.u.swapaxes(1, 2)
    lower = decay[:, :, :-1] * jnp.einsum("bpik,bpjk->bpij", u, u) * tokens.step.swapaxes(1, 2)[:, :, None, :]
    return lower if tokens.beta is None else tokens.beta.swapaxes(1, 2)[..., None] * lower


def leaves_bounds(d: jax.Array, used: jax.Array, tokens: HypergradientTokens, bounds: tuple[float, float]) -> jax.Array:
    """Return True for the heads [B, P] that leave the bounds in a chunk.

    The initial state of a segment is never projected, so it does not count.

    Args:
        d: state after the chunk, [B, P, K].
        used: state before each token, [B, C, P, K].
        tokens: the chunk.
        bounds: (lo, hi).
    """
    lo, hi = (jnp.asarray(x, d.dtype) for x in bounds)
    updated = used[:, 1:]
    inside = (updated >= lo) & (updated <= hi)  # False for NaN
    if tokens.reset is not None:
        inside = inside | tokens.reset[:, 1:, None, None]
    return ~(jnp.all(inside, axis=(1, 3)) & jnp.all((d >= lo) & (d <= hi), axis=-1))


def _projected_chunk(
    d: jax.Array, tokens: HypergradientTokens, start: HypergradientStart, bounds: Bounds, leaves: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Compute a chunk, with the scan for the heads that leave the bounds in it (leaves, [B, P] bool)."""
    # With a zero step the affine form of a recomputed head cannot overflow (its gradient would be 0 * inf).
    without_step = tokens._replace(step=jnp.where(leaves[:, None, :], 0.0, tokens.step))
    affine = affine_chunk(d, without_step, start)

    def recompute() -> tuple[jax.Array, jax.Array]:
        exact = scan_tokens(d, tokens, start, bounds)
        return (
            jnp.where(leaves[..., None], exact[0], affine[0]),
            jnp.where(leaves[:, None, :, None], exact[1], affine[1]),
        )

    return lax.cond(jnp.any(leaves), recompute, lambda: affine)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def scan_projected_chunks(
    d: jax.Array, tokens: HypergradientTokens, start: HypergradientStart, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """Scan over chunks, [N, B, C, ...] tokens: (final d [B, P, K], d before each token [N, B, C, P, K])."""
    final, (used, _, _) = _forward(d, tokens, start, bounds)
    return final, used


def _forward(d: jax.Array, tokens: HypergradientTokens, start: HypergradientStart, bounds: Bounds) -> Any:
    """Return (final d, (d before each token, d before each chunk, heads that leave the bounds in each chunk))."""

    def step(d: jax.Array, chunk: HypergradientTokens) -> tuple[jax.Array, Any]:
        after, used = affine_chunk(d, chunk, start)
        if bounds is None:
            return after, (used, d, None)
        leaves = leaves_bounds(after, used, chunk, bounds)
        after, used = lax.cond(
            jnp.any(leaves),
            lambda: _projected_chunk(d, chunk, start, bounds, leaves),
            lambda: (after, used),
        )
        return after, (used, d, leaves)

    return lax.scan(step, d, tokens)


def _scan_fwd(d: jax.Array, tokens: HypergradientTokens, start: HypergradientStart, bounds: Bounds) -> Any:
    final, (used, states, leaves) = _forward(d, tokens, start, bounds)
    return (final, used), (tokens, start, states, leaves)


def _scan_bwd(bounds: Bounds, saved: Any, cotangents: Any) -> Any:
    tokens, start, states, leaves = saved
    d_final, d_used = cotangents

    def step(carry: Any, chunk: Any) -> Any:
        d_after, d_start = carry
        d, tokens, leaves, d_used = chunk
        if bounds is None:
            _, pull = jax.vjp(affine_chunk, d, tokens, start)
        else:
            _, pull = jax.vjp(lambda d, t, s: _projected_chunk(d, t, s, bounds, leaves), d, tokens, start)
        d_before, d_tokens, d_start_here = pull((d_after, d_used))
        return (d_before, jax.tree.map(jnp.add, d_start, d_start_here)), d_tokens

    zero = jax.tree.map(jnp.zeros_like, start)
    (d_initial, d_start), d_tokens = lax.scan(step, (d_final, zero), (states, tokens, leaves, d_used), reverse=True)
    return d_initial, d_tokens, d_start


scan_projected_chunks.defvjp(_scan_fwd, _scan_bwd)
