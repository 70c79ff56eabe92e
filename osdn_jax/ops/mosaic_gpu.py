"""Implementations of the operators by the Pallas kernels for Hopper GPUs."""

import jax
import jax.numpy as jnp

from osdn_jax.ops import selection
from osdn_jax.ops.arguments import Call
from osdn_jax.ops.hypergradient_chunk import Bounds, Start, Tokens
from osdn_jax.ops.selection import on_hopper
from pallas_kernels import delta_rule as delta_rule_kernels
from pallas_kernels import gram as gram_kernels
from pallas_kernels import hypergradient as hypergradient_kernels
from pallas_kernels.common.tiles import CHUNK


def by_default() -> bool:
    """Return True if `implementation=None` means the kernels, for the arguments that they support."""
    return selection.MOSAIC_GPU_MEASURED and on_hopper()


def limitation(call: Call, chunk_size: int | None) -> str | None:
    """Return why the kernels do not support a call, naming the argument; None if they do."""
    if chunk_size not in (None, CHUNK):
        return _chunk_limitation(chunk_size)
    return delta_rule_kernels.limitation(call.q, call.k, call.v, call.beta, call.w)


def delta_rule(
    call: Call, *, erase: bool, scale: float, chunk_size: int | None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Run the kernels of the delta rule, or with interpret their interpreter, on any machine.

    Raises:
        NotImplementedError: the kernels do not support the call, or there is no Hopper GPU.
    """
    _refuse(limitation(call, chunk_size), interpret)
    return delta_rule_kernels.delta_rule(
        call.q,
        call.k,
        call.v,
        call.beta,
        write_key=call.w,
        log_decay=call.log_decay,
        erase=erase,
        scale=scale,
        initial_state=call.memory,
        resets=call.restarts,
        interpret=interpret,
    )


def hypergradient_limitation(k: jax.Array, tokens: Tokens, chunk_size: int | None) -> str | None:
    """Return why the kernels do not support the hypergradient preconditioner of keys k [B, T, P, K], or None."""
    if chunk_size not in (None, CHUNK):
        return _chunk_limitation(chunk_size)
    if tokens.u.dtype != jnp.float32:
        return f"k: its state is {tokens.u.dtype} here, the kernels keep float32"
    return hypergradient_kernels.limitation(k)


def hypergradient(
    k: jax.Array,
    tokens: Tokens,
    start: Start,
    bounds: Bounds,
    chunk_size: int | None,
    *,
    multiply: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Run the kernels of the hypergradient preconditioner, for its d or its write keys; raise like `delta_rule`."""
    _refuse(hypergradient_limitation(k, tokens, chunk_size), interpret)
    return hypergradient_kernels.hypergradient(
        k,
        tokens.step,
        tokens.beta,
        tokens.log_forget,
        tokens.restart,
        start.initial,
        start.restart,
        start.anchor,
        bounds,
        multiply=multiply,
        interpret=interpret,
    )


def gram_limitation(k: jax.Array, log_decay: jax.Array, chunk_size: int | None) -> str | None:
    """Return why the kernels do not support the Gram preconditioner of keys k [B, T, P, K], or None."""
    if chunk_size not in (None, CHUNK):
        return _chunk_limitation(chunk_size)
    return gram_kernels.limitation(k, log_decay)


def gram(
    k: jax.Array,
    log_decay: jax.Array,
    gain: jax.Array,
    center: jax.Array,
    squash: float,
    initial: jax.Array,
    restarts: jax.Array | None,
    chunk_size: int | None,
    *,
    multiply: bool,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Run the kernels of the Gram preconditioner, for its multipliers or its write keys; raise like `delta_rule`."""
    _refuse(gram_limitation(k, log_decay, chunk_size), interpret)
    return gram_kernels.gram(
        k, log_decay, gain, center, squash, initial, restarts, multiply=multiply, interpret=interpret
    )


def _chunk_limitation(chunk_size: int | None) -> str:
    return f"chunk_size: got {chunk_size}, the kernels work in chunks of {CHUNK}"


def _refuse(reason: str | None, interpret: bool) -> None:
    if reason is None and not interpret and not on_hopper():
        reason = f"got a {jax.devices()[0].device_kind}, the kernels need a GPU of compute capability 9.0"
    if reason is not None:
        name = "mosaic_gpu_interpret" if interpret else "mosaic_gpu"
        raise NotImplementedError(f"implementation {name!r}: {reason}")
