"""The hypergradient preconditioner in chunks, with exact projection.

Without the projection the recurrence is a delta rule with key k^2 and a one-dimensional value, so a chunk is one
triangular solve and two products. The first value to leave the bounds in a chunk comes after exact values only, so a
chunk none of whose values leaves them is exact, and one that does is done again token by token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from osdn_jax.ops import collectives
from osdn_jax.ops.scores import pair_decay
from osdn_jax.ops.tiling import fitting_chunk, to_chunks
from osdn_jax.ops.triangular import unit_lower_inverse


class Tokens(NamedTuple):
    """What the recurrence reads; optional parts are None. They lead with [B] for one token, with [B, C] for a chunk."""

    u: jax.Array  # squared keys [..., P, K]
    beta: jax.Array | None  # [..., P]; None is 1
    step: jax.Array  # eta * b_t, divided by the normaliser if there is one [..., P]
    log_forget: jax.Array | None  # [..., P]
    restart: jax.Array | None  # [...] bool: the state restarts before this token


class Start(NamedTuple):
    """What documents start from and what their state is drawn toward."""

    initial: jax.Array  # the first document [B, P, K]
    restart: jax.Array  # the others [B, P, K]
    anchor: jax.Array | None  # [B, P, K]; None is 0


Bounds = tuple[float, float] | None


def update(d: jax.Array, token: Tokens, start: Start, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """One token of the specification: d [B, P, K] -> (d after the token, d that the token uses)."""
    if token.restart is not None:
        d = jnp.where(token.restart[:, None, None], start.restart, d)
    predicted = jnp.sum(d * token.u, axis=-1)
    feedback = 1.0 - (predicted if token.beta is None else token.beta * predicted)
    after = d
    if token.log_forget is not None:
        forget = jnp.exp(token.log_forget)[..., None]
        after = forget * after
        if start.anchor is not None:
            after = after - jnp.expm1(token.log_forget)[..., None] * start.anchor
    after = after + (token.step * feedback)[..., None] * token.u
    return project(after, bounds), d


def project(d: jax.Array, bounds: Bounds) -> jax.Array:
    """Clips to the bounds. A value on a bound passes its gradient on; jnp.clip would halve it."""
    if bounds is None:
        return d
    lo, hi = (jnp.asarray(x, d.dtype) for x in bounds)
    return jnp.where(d < lo, lo, jnp.where(d > hi, hi, d))


def token_by_token(
    d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds, loop: Callable[..., Any] = lax.scan
) -> tuple[jax.Array, jax.Array]:
    """The specification as a scan: d [B, P, K], [B, T, ...] tokens -> (final d, d before each token [B, T, P, K]).

    loop: `lax.scan`, or what takes its arguments (step, carry, tokens) and computes the same.
    """
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    final, used = loop(lambda d, token: update(d, token, start, bounds), d, tokens)
    return final, jnp.moveaxis(used, 0, 1)


def affine_chunk(d: jax.Array, tokens: Tokens, start: Start) -> tuple[jax.Array, jax.Array]:
    """A chunk without the projection: d [B, P, K], [B, C, ...] tokens -> (d after the chunk, d before each token)."""
    u = tokens.u.swapaxes(1, 2)  # [B, P, C, K]
    step = tokens.step.swapaxes(1, 2)
    size, dtype = u.shape[2], u.dtype
    decay, since_start = _decay(tokens)
    lead = jnp.ones((1, 1, size + 1), dtype)  # what is left, before each token, of what its document started from
    first = None
    if tokens.restart is not None:
        document = jnp.cumsum(tokens.restart.astype(jnp.int32), axis=1)
        document = jnp.concatenate([document, document[:, -1:]], axis=1)
        same = (document[:, :, None] == document[:, None, :-1])[:, None].astype(dtype)
        first = (document == 0)[:, None, :, None]
        decay, since_start = decay * same, since_start * same
    if tokens.log_forget is not None:
        lead = jnp.exp(jnp.sum(since_start * tokens.log_forget.swapaxes(1, 2)[:, :, None, :], axis=-1))

    restart = start.restart if start.anchor is None else start.restart - start.anchor
    origin = d if start.anchor is None else d - start.anchor  # the recurrence is linear in d - anchor
    origin = origin[:, :, None, :]
    if first is not None:
        origin = jnp.where(first, origin, restart[:, :, None, :])
    origin = lead[..., None] * origin  # [B, P, C + 1 or 1, K]

    recalled = jnp.sum(u * (origin[:, :, :-1] if origin.shape[2] > 1 else origin), axis=-1)
    if start.anchor is not None:
        recalled = recalled + jnp.sum(u * start.anchor[:, :, None, :], axis=-1)
    if tokens.beta is not None:
        recalled = tokens.beta.swapaxes(1, 2) * recalled
    feedback = jnp.einsum("bpij,bpj->bpi", unit_lower_inverse(_lower(tokens, decay)), 1.0 - recalled)
    values = origin + jnp.einsum("bpij,bpjk->bpik", decay, (step * feedback)[..., None] * u)
    if start.anchor is not None:
        values = values + start.anchor[:, :, None, :]
    return values[:, :, -1], values[:, :, :-1].swapaxes(1, 2)


def transition(tokens: Tokens, chunk_size: int = 64) -> jax.Array:
    """M [B, P, K, K] of the state after [B, T, ...] tokens, M d + N, without the projection."""
    batch, length, heads, key_dim = tokens.u.shape
    size, dtype = fitting_chunk(chunk_size, length), tokens.u.dtype

    def step(states: jax.Array, chunk: Tokens) -> tuple[jax.Array, None]:
        u, step = chunk.u.swapaxes(1, 2), chunk.step.swapaxes(1, 2)
        decay, earlier = _decay(chunk)
        lead = jnp.ones((1, 1, size + 1), dtype)
        if chunk.log_forget is not None:
            lead = jnp.exp(jnp.sum(earlier * chunk.log_forget.swapaxes(1, 2)[:, :, None, :], axis=-1))
        recalled = lead[:, :, :-1, None] * jnp.einsum("bpik,bpkj->bpij", u, states)
        if chunk.beta is not None:
            recalled = chunk.beta.swapaxes(1, 2)[..., None] * recalled
        taken = jnp.einsum("bpij,bpjk->bpik", unit_lower_inverse(_lower(chunk, decay)), recalled)
        left = (decay[:, :, -1] * step)[..., None] * u
        return lead[:, :, -1, None, None] * states - jnp.einsum("bpik,bpij->bpkj", left, taken), None

    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=dtype), (batch, heads, key_dim, key_dim))
    identity = collectives.vary(identity, collectives.axes_of(tokens))
    states, _ = lax.scan(step, identity, jax.tree.map(lambda x: to_chunks(x, size), tokens._replace(restart=None)))
    if tokens.restart is None:
        return states
    return jnp.where(jnp.any(tokens.restart, axis=1)[:, None, None, None], 0.0, states)


def _decay(tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    """What is left before token i of what token j wrote, [B or 1, P or 1, C + 1, C], the last row after all tokens.

    And which tokens are earlier, 1 or 0, [1, 1, C + 1, C].
    """
    size, dtype = tokens.u.shape[1], tokens.u.dtype
    earlier = jnp.asarray(np.tril(np.ones((size + 1, size)), -1), dtype)[None, None]
    if tokens.log_forget is None:
        return earlier, earlier
    return jnp.pad(pair_decay(tokens.log_forget.swapaxes(1, 2)), ((0, 0), (0, 0), (1, 0), (0, 0))), earlier


def _lower(tokens: Tokens, decay: jax.Array) -> jax.Array:
    """L of (I + L) feedback = 1 - beta (what is recalled), [B, P, C, C]."""
    u = tokens.u.swapaxes(1, 2)
    lower = decay[:, :, :-1] * jnp.einsum("bpik,bpjk->bpij", u, u) * tokens.step.swapaxes(1, 2)[:, :, None, :]
    return lower if tokens.beta is None else tokens.beta.swapaxes(1, 2)[..., None] * lower


def crossed(d: jax.Array, used: jax.Array, tokens: Tokens, bounds: tuple[float, float]) -> jax.Array:
    """Which heads [B, P] leave the bounds in a chunk; what a document starts from is never projected."""
    lo, hi = (jnp.asarray(x, d.dtype) for x in bounds)
    updated = used[:, 1:]
    inside = (updated >= lo) & (updated <= hi)  # False for NaN
    if tokens.restart is not None:
        inside = inside | tokens.restart[:, 1:, None, None]
    return ~(jnp.all(inside, axis=(1, 3)) & jnp.all((d >= lo) & (d <= hi), axis=-1))


def _projected_chunk(
    d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds, leaves: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A chunk, given which heads leave the bounds in it [B, P]."""
    # Without its step the affine form of a head that is done again cannot overflow, nor its gradient be 0 * inf.
    calm = tokens._replace(step=jnp.where(leaves[:, None, :], 0.0, tokens.step))
    affine = affine_chunk(d, calm, start)

    def again() -> tuple[jax.Array, jax.Array]:
        exact = token_by_token(d, tokens, start, bounds)
        return (
            jnp.where(leaves[..., None], exact[0], affine[0]),
            jnp.where(leaves[:, None, :, None], exact[1], affine[1]),
        )

    return lax.cond(jnp.any(leaves), again, lambda: affine)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked(d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """All chunks: tokens lead with [N, B, C] -> (final d [B, P, K], d before each token [N, B, C, P, K])."""
    final, (used, _, _) = _forward(d, tokens, start, bounds)
    return final, used


def _forward(d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds) -> tuple[jax.Array, Any]:
    """(final d, (d before each token, d before each chunk, which heads leave the bounds in each chunk))."""

    def step(d: jax.Array, chunk: Tokens) -> tuple[jax.Array, Any]:
        after, used = affine_chunk(d, chunk, start)
        if bounds is None:
            return after, (used, d, None)
        leaves = crossed(after, used, chunk, bounds)
        after, used = lax.cond(
            jnp.any(leaves),
            lambda: _projected_chunk(d, chunk, start, bounds, leaves),
            lambda: (after, used),
        )
        return after, (used, d, leaves)

    return lax.scan(step, d, tokens)


def _chunked_fwd(d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds) -> tuple[Any, Any]:
    final, (used, states, leaves) = _forward(d, tokens, start, bounds)
    return (final, used), (tokens, start, states, leaves)


def _chunked_bwd(bounds: Bounds, saved: Any, cotangents: Any) -> Any:
    tokens, start, states, leaves = saved
    d_final, d_used = cotangents

    def step(carry: Any, chunk: Any) -> Any:
        d_after, d_start = carry
        d, tokens, leaves, d_used = chunk
        if bounds is None:
            _, pull = jax.vjp(affine_chunk, d, tokens, start)
        else:
            _, pull = jax.vjp(lambda d, t, s: _projected_chunk(d, t, s, bounds, leaves), d, tokens, start)
        d_before, d_tokens, more = pull((d_after, d_used))
        return (d_before, jax.tree.map(jnp.add, d_start, more)), d_tokens

    zero = jax.tree.map(jnp.zeros_like, start)
    (d_initial, d_start), d_tokens = lax.scan(step, (d_final, zero), (states, tokens, leaves, d_used), reverse=True)
    return d_initial, d_tokens, d_start


chunked.defvjp(_chunked_fwd, _chunked_bwd)
