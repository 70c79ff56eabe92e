"""The hypergradient preconditioner over a sequence that is split over devices.

Where no projection binds, the state after a device's tokens is affine in the one before them, and all devices work at
once. Where one does, they work in order, each from the state that the one to its left ends with.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import collectives
from osdn_jax.ops.hypergradient_chunk import Bounds, Start, Tokens, crossed, transition

Run = Callable[[jax.Array, Tokens, Start, Bounds], tuple[jax.Array, jax.Array]]
Inputs = tuple[jax.Array, Tokens, Start]  # all but which tokens start a document


def split_over(
    run: Run, k: jax.Array, tokens: Tokens, start: Start, bounds: Bounds, axis: str
) -> tuple[jax.Array, jax.Array]:
    """(d before each token here, d after the last token of all), by run on each device of the axis."""
    inputs = (k, tokens, start)
    (k, tokens, start) = collectives.vary(inputs, collectives.axes_of(inputs))
    used, final = _split_over((k, tokens._replace(restart=None), start), tokens.restart, run, bounds, axis)
    return used, collectives.of_last(final, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _split_over(inputs: Inputs, restart: jax.Array | None, run: Run, bounds: Bounds, axis: str) -> Any:
    """(d before each token, d after this device's last)."""
    return _forward(inputs, restart, run, bounds, axis)[0]


def _forward(inputs: Inputs, restart: jax.Array | None, run: Run, bounds: Bounds, axis: str) -> Any:
    def local(d: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
        return _run(run, (*inputs[:2], inputs[2]._replace(initial=d)), restart, bounds)

    first = inputs[2].initial
    tokens = inputs[1]._replace(restart=restart)
    kept = transition(tokens)
    _, own = local(jnp.zeros_like(first), None)
    restarted = None if restart is None else jnp.any(restart, axis=1)
    d = collectives.entering(_after, (kept, own, restarted), first, axis)
    used, final = local(d, None)
    if bounds is None:
        return (used, final), (inputs, restart, d, kept, None)
    leaves = _anywhere(jnp.any(crossed(final, used, tokens, bounds)))
    used, final, d = lax.cond(leaves, lambda: _in_order(local, first, used, bounds, axis), lambda: (used, final, d))
    return (used, final), (inputs, restart, d, kept, leaves)


def _in_order(local: Any, first: jax.Array, like: jax.Array, bounds: Bounds, axis: str) -> Any:
    """(d before each token, d after this device's last, d before its first): one device after another."""
    index = lax.axis_index(axis)
    used, d, final = like, first, first
    for turn in range(lax.axis_size(axis)):
        used, final = lax.cond(index == turn, lambda d=d: local(d, bounds), lambda u=used, f=final: (u, f))
        d = jnp.where(index == turn + 1, collectives.from_left(final, axis), d)
    return used, final, d


def _fwd(inputs: Inputs, restart: jax.Array | None, run: Run, bounds: Bounds, axis: str) -> Any:
    return _forward(inputs, restart, run, bounds, axis)


def _bwd(run: Run, bounds: Bounds, axis: str, saved: Any, cotangents: Any) -> Any:
    inputs, restart, d, kept, leaves = saved
    k, tokens, start = inputs
    here = (k, tokens, start._replace(initial=d))

    def at_once() -> Inputs:
        _, pull = jax.vjp(lambda x: _run(run, x, restart, None), here)
        d_used, d_final = cotangents
        own = pull(cotangents)[0][2].initial
        parts = (kept.swapaxes(-1, -2), own, None if restart is None else jnp.any(restart, axis=1))
        return pull((d_used, d_final + collectives.leaving_cotangent(_after, parts, d_final, axis)))[0]

    def in_order() -> Inputs:
        _, pull = jax.vjp(lambda x: _run(run, x, restart, bounds), here)
        index, (d_used, d_final) = lax.axis_index(axis), cotangents
        size = lax.axis_size(axis)
        gradient = jax.tree.map(jnp.zeros_like, here)
        gradient = collectives.vary(gradient, collectives.axes_of(here))
        for turn in reversed(range(size)):
            now = d_final
            gradient = lax.cond(
                index == turn, lambda now=now: pull((d_used, now))[0], lambda gradient=gradient: gradient
            )
            d_left = lax.ppermute(gradient[2].initial, axis, [(i + 1, i) for i in range(size - 1)])
            d_final = jnp.where(index == turn - 1, d_final + d_left, d_final)
        return gradient

    gradient = at_once() if leaves is None else lax.cond(leaves, in_order, at_once)
    # Only the first device begins with what was given; the others' states come from the left.
    first = lax.axis_index(axis) == 0
    start = gradient[2]._replace(initial=jnp.where(first, gradient[2].initial, jnp.zeros_like(d)))
    return (*gradient[:2], start), None


_split_over.defvjp(_fwd, _bwd)


def _run(run: Run, inputs: Inputs, restart: jax.Array | None, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
    k, tokens, start = inputs
    return run(k, tokens._replace(restart=restart), start, bounds)


def _after(parts: tuple[jax.Array, jax.Array, jax.Array | None], d: jax.Array) -> jax.Array:
    transition, own, restarted = parts
    return collectives.matrix_after((transition, own[..., None], restarted), d[..., None])[..., 0]


def _anywhere(here: jax.Array) -> jax.Array:
    """Whether it holds on any device at all: their collectives have to meet."""
    axes = tuple(sorted(collectives.axes_of(here)))
    return lax.psum(here.astype(jnp.int32), axes) > 0
