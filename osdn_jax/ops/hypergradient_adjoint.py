"""The hypergradient recurrence token by token, with its gradient written out.

The values are those of the scan. For the gradient only one short recurrence is left, that of the cotangent of d; all
else is formed for all tokens at once. On a CPU that is the fastest of the three forms.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops.hypergradient_chunk import Bounds, Start, Tokens, project, update


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_by_token(d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    """d [B, P, K] and [B, T, ...] tokens -> (final d, d before each token [B, T, P, K])."""
    (final, used), _ = _forward(d, tokens, start, bounds)
    return final, used


def _forward(d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds) -> tuple[Any, Any]:
    def step(d: jax.Array, token: Tokens) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
        after, used = update(d, token, start, None)
        if bounds is None:
            return after, (used, None)
        projected = project(after, bounds)
        return projected, (used, projected == after)

    final, (used, within) = lax.scan(step, d, jax.tree.map(_time_first, tokens))
    return (final, _batch_first(used)), within


def _forward_and_saved(d: jax.Array, tokens: Tokens, start: Start, bounds: Bounds) -> tuple[Any, Any]:
    (final, used), within = _forward(d, tokens, start, bounds)
    return (final, used), (tokens, start, used, within)


def _backward(bounds: Bounds, saved: Any, cotangents: Any) -> Any:
    del bounds
    tokens, start, used, within = saved
    d_final, d_used = cotangents
    gain = tokens.step if tokens.beta is None else tokens.step * tokens.beta
    forget = None if tokens.log_forget is None else jnp.exp(tokens.log_forget)[..., None]

    def step(after: jax.Array, token: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
        u, gain, forget, restart, within, d_used = token
        written = after if within is None else jnp.where(within, after, 0.0)
        kept = written if forget is None else forget * written
        before = d_used + kept - (gain * jnp.sum(written * u, axis=-1))[..., None] * u
        if restart is None:
            return before, (written, None)
        anew = restart[:, None, None]
        return jnp.where(anew, 0.0, before), (written, jnp.where(anew, before, 0.0))

    # written: the cotangent of what a token's update comes to, before the projection.
    per_token = jax.tree.map(_time_first, (tokens.u, gain, forget, tokens.restart))
    per_token = (*per_token, within, _time_first(d_used))
    d_initial, (written, d_restart) = lax.scan(step, d_final, per_token, reverse=True)
    written = _batch_first(written)

    u = tokens.u
    predicted, along = jnp.sum(used * u, axis=-1), jnp.sum(written * u, axis=-1)
    feedback = 1.0 - (predicted if tokens.beta is None else tokens.beta * predicted)
    d_tokens = Tokens(
        u=(tokens.step * feedback)[..., None] * written - (gain * along)[..., None] * used,
        beta=None if tokens.beta is None else -tokens.step * predicted * along,
        step=feedback * along,
        log_forget=None,
        restart=None,
    )
    d_anchor = None
    if forget is not None:
        drawn = used if start.anchor is None else used - start.anchor[:, None]
        d_tokens = d_tokens._replace(log_forget=jnp.sum(forget * written * drawn, axis=-1))
        if start.anchor is not None:
            d_anchor = jnp.sum(-jnp.expm1(tokens.log_forget)[..., None] * written, axis=1)
    restarted = jnp.zeros_like(start.restart) if d_restart is None else jnp.sum(d_restart, axis=0)
    return d_initial, d_tokens, Start(jnp.zeros_like(start.initial), restarted, d_anchor)


token_by_token.defvjp(_forward_and_saved, _backward)


def _time_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, 0)


_batch_first = functools.partial(jnp.moveaxis, source=0, destination=1)
