"""The Pallas kernels for Hopper GPUs as implementations of the three operators.

Each operator has a function (call, options) that runs the kernels, and one that returns why they cannot serve a call.
With interpret=True the kernels run in their interpreter, on any machine. The kernels are imported by the first function
that needs them: that takes 0.2 s, for Pallas and its GPU lowering, which nothing else on a CPU needs.
"""

import jax
import jax.numpy as jnp

from osdn_jax.ops import selection
from osdn_jax.ops.calls import (
    DeltaRuleCall,
    DeltaRuleOptions,
    GramCall,
    GramOptions,
    HypergradientCall,
    HypergradientOptions,
)
from osdn_jax.ops.selection import on_hopper


def by_default() -> bool:
    """Return True if None picks the kernels on this device."""
    return selection.MOSAIC_GPU_MEASURED and on_hopper()


def delta_rule_limitation(call: DeltaRuleCall, options: DeltaRuleOptions, *, interpret: bool = False) -> str | None:
    """Return why the kernels cannot serve the call, beginning with the argument's name; None if they can."""
    from pallas_kernels import delta_rule as kernels

    return (
        _chunk_limitation(options.chunk_size)
        or kernels.limitation(call.q, call.k, call.v, call.beta, call.w)
        or _device_limitation(interpret)
    )


def delta_rule(
    call: DeltaRuleCall, options: DeltaRuleOptions, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Run the delta rule: (outputs, final state)."""
    from pallas_kernels import delta_rule as kernels

    return kernels.delta_rule(
        call.q,
        call.k,
        call.v,
        call.beta,
        write_key=call.w,
        log_decay=call.log_decay,
        erase=options.erase,
        scale=options.scale,
        initial_state=call.state,
        resets=call.resets,
        interpret=interpret,
    )


def hypergradient_limitation(
    call: HypergradientCall, options: HypergradientOptions, *, interpret: bool = False
) -> str | None:
    """Return why the kernels cannot serve the call, beginning with the argument's name; None if they can."""
    from pallas_kernels import hypergradient as kernels

    dtype = call.step.dtype
    if dtype != jnp.float32:
        return f"k: got a state of {dtype}, the kernels keep float32"
    return _chunk_limitation(options.chunk_size) or kernels.limitation(call.k) or _device_limitation(interpret)


def hypergradient(
    call: HypergradientCall, options: HypergradientOptions, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Run the hypergradient preconditioner: (d, or write keys if options.write_key; final d)."""
    from pallas_kernels import hypergradient as kernels

    return kernels.hypergradient(
        call.k,
        call.step,
        call.beta,
        call.log_forget,
        call.resets,
        call.start.initial,
        call.start.after_reset,
        call.start.anchor,
        options.bounds,
        return_write_key=options.write_key,
        interpret=interpret,
    )


def gram_limitation(call: GramCall, options: GramOptions, *, interpret: bool = False) -> str | None:
    """Return why the kernels cannot serve the call, beginning with the argument's name; None if they can."""
    from pallas_kernels import gram as kernels

    return (
        _chunk_limitation(options.chunk_size)
        or kernels.limitation(call.k, call.log_decay)
        or _device_limitation(interpret)
    )


def gram(call: GramCall, options: GramOptions, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Run the Gram preconditioner: (multiplier, or write keys if options.write_key; final A)."""
    from pallas_kernels import gram as kernels

    return kernels.gram(
        call.k,
        call.log_decay,
        call.gain,
        call.center,
        options.squash,
        call.initial,
        call.resets,
        return_write_key=options.write_key,
        interpret=interpret,
    )


def _chunk_limitation(chunk_size: int | None) -> str | None:
    from pallas_kernels.common.tiles import CHUNK

    if chunk_size in (None, CHUNK):
        return None
    return f"chunk_size: got {chunk_size}, the kernels work in chunks of {CHUNK}"


def _device_limitation(interpret: bool) -> str | None:
    if interpret or on_hopper():
        return None
    return f"got a {jax.devices()[0].device_kind}, the kernels need a GPU of compute capability 9.0"
