"""The hypergradient preconditioner over a sequence that is split over devices.

If no projection binds, the state after a device's tokens is affine in the state before them, and all devices run at the
same time. If one does, the devices run sequentially, each from the final state of the preceding one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import sequence_parallel
from osdn_jax.ops.calls import HypergradientCall, HypergradientOptions
from osdn_jax.ops.hypergradient_recurrence import leaves_bounds, transition

Run = Callable[[HypergradientCall, HypergradientOptions], tuple[jax.Array, jax.Array]]


def split_over(run: Run, call: HypergradientCall, options: HypergradientOptions) -> tuple[jax.Array, jax.Array]:
    """Run the preconditioner on all devices of options.context_axis.

    Args:
        run: (call, options) -> (d before each token, d after the last) on one device.
        call: this device's tokens, and the state before the first token of the whole sequence.
        options: static options; write_key is False.

    Returns:
        (d before each of this device's tokens, d after the last token of the whole sequence).
    """
    call = sequence_parallel.vary(call, sequence_parallel.axes_of(call))
    d, final = _split_over(call._replace(resets=None), call.resets, run, options)
    return d, sequence_parallel.from_last(final, str(options.context_axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _split_over(call: HypergradientCall, resets: jax.Array | None, run: Run, options: HypergradientOptions) -> Any:
    """Return (d before each token, d after this device's last)."""
    return _forward(call, resets, run, options)[0]


def _forward(call: HypergradientCall, resets: jax.Array | None, run: Run, options: HypergradientOptions) -> Any:
    """Return ((d before each token, d after this device's last), residuals for the backward pass)."""
    axis, unbounded = str(options.context_axis), options._replace(bounds=None)

    def local(d: jax.Array, options: HypergradientOptions) -> tuple[jax.Array, jax.Array]:
        return run(call._replace(start=call.start._replace(initial=d), resets=resets), options)

    first = call.start.initial
    tokens = call._replace(resets=resets).tokens()
    matrix = transition(tokens)
    _, added = local(jnp.zeros_like(first), unbounded)
    any_reset = None if resets is None else jnp.any(resets, axis=1)
    d = sequence_parallel.state_before(_after, (matrix, added, any_reset), first, axis)
    used, final = local(d, unbounded)
    if options.bounds is None:
        return (used, final), (call, resets, d, matrix, None)
    leaves = _on_any_device(jnp.any(leaves_bounds(final, used, tokens, options.bounds)))
    used, final, d = lax.cond(leaves, lambda: _sequentially(local, first, used, options), lambda: (used, final, d))
    return (used, final), (call, resets, d, matrix, leaves)


def _sequentially(local: Any, first: jax.Array, like: jax.Array, options: HypergradientOptions) -> Any:
    """Run one device after another: (d before each token, d after this device's last, d before its first)."""
    axis = str(options.context_axis)
    index = lax.axis_index(axis)
    used, d, final = like, first, first
    for device in range(lax.axis_size(axis)):
        used, final = lax.cond(index == device, lambda d=d: local(d, options), lambda u=used, f=final: (u, f))
        d = jnp.where(index == device + 1, sequence_parallel.from_left(final, axis), d)
    return used, final, d


def _backward(run: Run, options: HypergradientOptions, saved: Any, cotangents: Any) -> Any:
    call, resets, d, matrix, leaves = saved
    axis = str(options.context_axis)
    local = call._replace(start=call.start._replace(initial=d))

    def run_with(options: HypergradientOptions) -> Callable[[HypergradientCall], Any]:
        return lambda call: run(call._replace(resets=resets), options)

    def at_once() -> HypergradientCall:
        _, pull = jax.vjp(run_with(options._replace(bounds=None)), local)
        d_used, d_final = cotangents
        added = pull(cotangents)[0].start.initial
        summary = (matrix.swapaxes(-1, -2), added, None if resets is None else jnp.any(resets, axis=1))
        return pull((d_used, d_final + sequence_parallel.cotangent_after(_after, summary, d_final, axis)))[0]

    def sequentially() -> HypergradientCall:
        _, pull = jax.vjp(run_with(options), local)
        index, (d_used, d_final) = lax.axis_index(axis), cotangents
        size = lax.axis_size(axis)
        gradient = jax.tree.map(jnp.zeros_like, local)
        gradient = sequence_parallel.vary(gradient, sequence_parallel.axes_of(local))
        for device in reversed(range(size)):
            gradient = lax.cond(
                index == device, lambda d=d_final: pull((d_used, d))[0], lambda gradient=gradient: gradient
            )
            d_left = lax.ppermute(gradient.start.initial, axis, [(i + 1, i) for i in range(size - 1)])
            d_final = jnp.where(index == device - 1, d_final + d_left, d_final)
        return gradient

    gradient = at_once() if leaves is None else lax.cond(leaves, sequentially, at_once)
    # Only the first device starts from the given state; each other device starts from the preceding one's final state.
    first = lax.axis_index(axis) == 0
    start = gradient.start._replace(initial=jnp.where(first, gradient.start.initial, jnp.zeros_like(d)))
    return gradient._replace(start=start), None


_split_over.defvjp(_forward, _backward)


def _after(summary: tuple[jax.Array, jax.Array, jax.Array | None], d: jax.Array) -> jax.Array:
    matrix, added, any_reset = summary
    return sequence_parallel.affine_after((matrix, added[..., None], any_reset), d[..., None])[..., 0]


def _on_any_device(flag: jax.Array) -> jax.Array:
    """Return True if flag is true on any device. All devices must call this."""
    axes = tuple(sorted(sequence_parallel.axes_of(flag)))
    return lax.psum(flag.astype(jnp.int32), axes) > 0
