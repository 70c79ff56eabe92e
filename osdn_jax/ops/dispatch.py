"""Run a checked call with a named implementation of its operator, or with the default one."""

from typing import Any

import jax

from osdn_jax.ops.containment import contained, scan_in_blocks
from osdn_jax.ops.selection import Items, Registry, Results, choose


def dispatch(registry: Items, name: str | None, call: Any, options: Any) -> Results:
    """Return (outputs, final state) of a call.

    Args:
        registry: items of the operator's IMPLEMENTATIONS, which has an entry "scan"; a tuple, since it must be
            hashable to be static under jit.
        name: an implementation, or None for the fastest, which may differ between a forward pass and a gradient.
        call: a NamedTuple of `osdn_jax.ops.calls`, whose field `resets` marks the starts of packed segments.
        options: its static options.

    Raises:
        NotImplementedError: the named implementation cannot serve the call on this device.
    """
    implementations = dict(registry)
    if name is not None:
        return _run(implementations, name, call, options)
    forward, backward = (choose(implementations, call, options, gradient=gradient) for gradient in (False, True))
    if forward == backward:
        return _run(implementations, forward, call, options, by_default=True)

    @jax.custom_vjp
    def forward_only(call: Any) -> Results:
        return _run(implementations, forward, call, options, by_default=True)

    def with_gradient(call: Any) -> tuple[Results, Any]:
        return jax.vjp(lambda call: _run(implementations, backward, call, options, by_default=True), call)

    forward_only.defvjp(with_gradient, lambda pull, cotangents: pull(cotangents))
    return forward_only(call)


def _run(implementations: Registry, name: str, call: Any, options: Any, *, by_default: bool = False) -> Results:
    """Run one implementation; recompute a packed sequence with the scan if the result is not finite."""
    entry = implementations[name]
    limitation = entry.limitation(call, options)
    if limitation is not None:
        raise NotImplementedError(f"implementation {name!r}: {limitation}")
    run = entry.by_default if by_default and entry.by_default else entry.run
    if not entry.mixes_segments:
        return run(call, options)

    def fast(call: Any, resets: jax.Array | None) -> Results:
        return run(call._replace(resets=resets), options)

    def exact(call: Any, resets: jax.Array | None) -> Results:
        return implementations["scan"].run(call._replace(resets=resets), options, loop=scan_in_blocks)

    return contained(fast, exact, call._replace(resets=None), call.resets)
