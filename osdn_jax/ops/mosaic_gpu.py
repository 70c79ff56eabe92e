"""The Pallas kernels for Hopper GPUs as implementations of the operators."""

import functools

import jax

from osdn_jax.ops.arguments import Call
from pallas_kernels import delta_rule as kernels
from pallas_kernels.tiles import CHUNK


@functools.cache
def on_hopper() -> bool:
    """Whether programs run on a Hopper GPU unless told otherwise."""
    device = jax.devices()[0]
    return device.platform == "gpu" and device.compute_capability == "9.0"


def limitation(call: Call, chunk_size: int | None) -> str | None:
    """Why the kernels cannot serve a call, naming the argument; None where they can."""
    if chunk_size not in (None, CHUNK):
        return f"chunk_size: got {chunk_size}, the kernels work in chunks of {CHUNK}"
    return kernels.limitation(call.q, call.k, call.v, call.beta, call.w)


def delta_rule(
    call: Call, *, erase: bool, scale: float, chunk_size: int | None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The delta rule by kernels, or with interpret by their interpreter on any machine.

    Raises NotImplementedError where the kernels cannot serve the call, or without a Hopper GPU.
    """
    name = "mosaic_gpu_interpret" if interpret else "mosaic_gpu"
    reason = limitation(call, chunk_size)
    if reason is None and not interpret and not on_hopper():
        reason = f"got a {jax.devices()[0].device_kind}, the kernels need a GPU of compute capability 9.0"
    if reason is not None:
        raise NotImplementedError(f"implementation {name!r}: {reason}")
    return kernels.delta_rule(
        call.q,
        call.k,
        call.v,
        call.beta,
        write_key=call.w,
        log_decay=call.log_decay,
        erase=erase,
        scale=scale,
        initial_state=call.memory,
        restarts=call.restarts,
        interpret=interpret,
    )
