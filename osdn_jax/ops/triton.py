"""The Triton kernels as implementations of the three operators.

Each operator has a function (call, options) that runs the kernels, and one that returns why they cannot serve a call.
With interpret=True the kernels run in Triton's interpreter, on any machine.

A limitation is sought in the arguments first, then in the device, then in the installation. Only after that are the
kernels imported, and Triton with them; they say last whether they serve the chunk size, which depends on the type and
the head dimensions.

The kernels have head dimensions of 32, 64, 128 and 256. Others, up to 256, are padded here and the results cut.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from osdn_jax.ops import selection
from osdn_jax.ops.calls import (
    Bounds,
    DeltaRuleCall,
    DeltaRuleOptions,
    GramCall,
    GramOptions,
    HypergradientCall,
    HypergradientOptions,
)
from triton_kernels import exported
from triton_kernels.common import installation, target

_DIMENSIONS = (32, 64, 128, 256)
_TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def by_default() -> bool:
    """Return True if None picks the kernels on this device."""
    return selection.TRITON_MEASURED and selection.on_triton_gpu()


def delta_rule_limitation(call: DeltaRuleCall, options: DeltaRuleOptions, *, interpret: bool = False) -> str | None:
    """Return why the kernels cannot serve the call, beginning with the argument's name; None if they can."""
    reason = (
        _argument_limitation("q", call.q)
        or _argument_limitation("v", call.v)
        or _mixed_types(call.q, [("k", call.k), ("v", call.v), ("write_key", call.w)])
        or _state_limitation("beta", call.beta)
        or _machine_limitation(interpret)
    )
    if reason is not None:
        return reason
    kernels = _kernels("delta_rule", interpret)
    key_dim, value_dim = (_padded_size(x.shape[-1]) for x in (call.q, call.v))
    padded = [_padded_type(x) for x in (call.q, call.k, call.v)]
    write_key = None if call.w is None else _padded_type(call.w)
    return _chunk_limitation(
        options.chunk_size, kernels.chunk_size(call.q.dtype, key_dim, value_dim)
    ) or kernels.limitation(*padded, call.beta, write_key)


def delta_rule(
    call: DeltaRuleCall, options: DeltaRuleOptions, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Run the delta rule: (outputs, final state)."""
    key_dim, value_dim = call.state.shape[-2:]
    log_decay = call.log_decay
    if log_decay is not None and call.channel_decay:
        log_decay = _pad(log_decay)
    # Padding channels of the write key, and so of the state, are zeros.
    state = _pad(_pad(call.state), axis=-2)
    out, final = _kernels("delta_rule", interpret).delta_rule(
        _pad(call.q),
        _pad(call.k),
        _pad(call.v),
        call.beta,
        write_key=None if call.w is None else _pad(call.w),
        log_decay=log_decay,
        erase=options.erase,
        scale=options.scale,
        initial_state=state,
        resets=call.resets,
        target=_target(interpret),
    )
    return out[..., :value_dim], final[..., :key_dim, :value_dim]


def hypergradient_limitation(
    call: HypergradientCall, options: HypergradientOptions, *, interpret: bool = False
) -> str | None:
    """Return why the kernels cannot serve the call, beginning with the argument's name; None if they can."""
    return (
        _argument_limitation("k", call.k)
        or _state_limitation("k", call.step)
        or _machine_limitation(interpret)
        or _preconditioner_limitation("hypergradient", interpret, options.chunk_size, call.k)
    )


def hypergradient(
    call: HypergradientCall, options: HypergradientOptions, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Run the hypergradient preconditioner: (d, or write keys if options.write_key; final d)."""
    key_dim = call.k.shape[-1]
    # The keys of padding channels are zeros, so only forgetting moves d there, towards the anchor: it stays where it
    # starts if both are the same value, and the projection does not bind if the bounds hold that value.
    value = _within(options.bounds)
    initial, after_reset, anchor = call.start
    if anchor is None and call.log_forget is not None and value != 0 and key_dim not in _DIMENSIONS:
        anchor = jnp.zeros_like(initial)
    out, final = _kernels("hypergradient", interpret).hypergradient(
        _pad(call.k),
        call.step,
        call.beta,
        call.log_forget,
        call.resets,
        _pad(initial, value),
        _pad(after_reset, value),
        None if anchor is None else _pad(anchor, value),
        options.bounds,
        return_write_key=options.write_key,
        target=_target(interpret),
    )
    return out[..., :key_dim], final[..., :key_dim]


def gram_limitation(call: GramCall, options: GramOptions, *, interpret: bool = False) -> str | None:
    """Return why the kernels cannot serve the call, beginning with the argument's name; None if they can."""
    return (
        _argument_limitation("k", call.k)
        or _state_limitation("log_decay", call.log_decay)
        or _machine_limitation(interpret)
        or _preconditioner_limitation("gram", interpret, options.chunk_size, call.k, call.log_decay)
    )


def gram(call: GramCall, options: GramOptions, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Run the Gram preconditioner: (multiplier, or write keys if options.write_key; final A)."""
    key_dim = call.k.shape[-1]
    # In padding channels A stays 0, and the multipliers, which are finite, get no cotangents.
    out, final = _kernels("gram", interpret).gram(
        _pad(call.k),
        call.log_decay,
        call.gain,
        call.center,
        options.squash,
        _pad(call.initial),
        call.resets,
        return_write_key=options.write_key,
        target=_target(interpret),
    )
    return out[..., :key_dim], final[..., :key_dim]


def _kernels(name: str, interpret: bool) -> Any:
    """Return the module of an operator's kernels, which imports Triton, or the programs that are to run instead."""
    if exported.in_use() and not interpret:
        return exported.kernels(name)
    return importlib.import_module(f"triton_kernels.{name}")


def _target(interpret: bool) -> target.Target:
    return target.INTERPRETER if interpret else target.target_in_use()


def _padded_size(size: int) -> int:
    return next(dimension for dimension in _DIMENSIONS if dimension >= size)


def _padded_type(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:-1], _padded_size(x.shape[-1])), x.dtype)


def _pad(x: jax.Array, value: float = 0.0, *, axis: int = -1) -> jax.Array:
    """Pad an axis of channels with a value, to a head dimension that the kernels have."""
    missing = _padded_size(x.shape[axis]) - x.shape[axis]
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value)


def _within(bounds: Bounds) -> float:
    """Return 0 if the bounds hold it, or else a value well inside of them."""
    low, high = bounds or (-math.inf, math.inf)
    if low <= 0 <= high:
        return 0.0
    if math.isinf(high):
        return 2 * low
    return 2 * high if math.isinf(low) else (low + high) / 2


def _argument_limitation(name: str, x: jax.Array) -> str | None:
    """Return why the kernels do not serve the type or the head dimension of an argument."""
    if x.dtype not in _TYPES:
        return f"{name}: got {x.dtype}, the kernels take bfloat16, float16 or float32"
    if x.shape[-1] > _DIMENSIONS[-1]:
        return f"{name}: got a head dimension of {x.shape[-1]}, the kernels take at most {_DIMENSIONS[-1]}"
    return None


def _mixed_types(q: jax.Array, others: Sequence[tuple[str, jax.Array | None]]) -> str | None:
    for name, x in others:
        if x is not None and x.dtype != q.dtype:
            return f"{name}: got {x.dtype} beside a q of {q.dtype}, the kernels take one type"
    return None


def _state_limitation(name: str, x: jax.Array) -> str | None:
    if x.dtype == jnp.float32:
        return None
    return f"{name}: got gates and a state of {x.dtype}, the kernels keep float32"


def _machine_limitation(interpret: bool) -> str | None:
    device = None if interpret else target.limitation()
    return device or (None if exported.in_use() and not interpret else installation.missing(interpret=interpret))


def _preconditioner_limitation(
    name: str, interpret: bool, chunk_size: int | None, k: jax.Array, *others: jax.Array
) -> str | None:
    kernels, padded = _kernels(name, interpret), _padded_type(k)
    served = kernels.chunk_size(k.dtype, padded.shape[-1])
    return _chunk_limitation(chunk_size, served) or kernels.limitation(padded, *others)


def _chunk_limitation(chunk_size: int | None, served: int | None) -> str | None:
    if chunk_size in (None, served):
        return None
    return f"chunk_size: got {chunk_size}, the kernels work in chunks of {served} with this type and head dimension"
