"""The launches of a case, found by tracing it: nothing is compiled or run."""

import functools
from dataclasses import dataclass, field

import jax

from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.programs import program, public_function
from triton_kernels.aot.cases import fills_the_gpu
from triton_kernels.aot.specialization import Specialization, specialize
from triton_kernels.common.launch import recorded
from triton_kernels.common.target import Target

# The projection leaves no summary of a chunk that could stand for it, so each head is one chain, in one program.
_ONE_PROGRAM_PER_HEAD = ("hypergradient_scan", "hypergradient_scan_backward")


@dataclass(frozen=True)
class Use:
    """One launch of a kernel.

    Args:
        case: the name of the case that launches it.
        programs: how many programs the launch has.
        must_fill: there must be at least as many as the GPU has multiprocessors.
    """

    case: str
    programs: int
    must_fill: bool = False


@dataclass(frozen=True)
class Trace:
    """The launches of one case.

    Args:
        case: its name.
        launches: in order.
        status: "traced", "refused" (the function raised NotImplementedError) or "failed" (any other error).
        message: of the exception; empty if there was none.
    """

    case: str
    launches: list[tuple[Specialization, Use]] = field(default_factory=list)
    status: str = "traced"
    message: str = ""


def trace(case: Case, capability: int) -> Trace:
    """Return what a case launches. Errors are returned, not raised.

    Args:
        case: to trace.
        capability: compute capability times 10 of the GPU.
    """
    try:
        return Trace(case.name, _launches(case, capability))
    except NotImplementedError as error:
        return Trace(case.name, status="refused", message=str(error))
    except Exception as error:  # noqa: BLE001 (any error is to be reported)
        return Trace(case.name, status="failed", message=f"{type(error).__name__}: {error}")


def _launches(case: Case, capability: int) -> list[tuple[Specialization, Use]]:
    operator = public_function("triton_kernels", case.function)
    function, arguments = program(case, functools.partial(operator, target=Target(capability)))
    # A function under jit is traced once for the same shapes, and such a trace holds zeros in place of the results.
    jax.clear_caches()
    try:
        with recorded() as found:
            jax.eval_shape(function, *arguments)
    finally:
        jax.clear_caches()
    if not found:
        raise LookupError("the case launches no kernel")
    uses = []
    for launch in found:
        batch = next(iter(launch.inputs.values())).shape[0]
        must_fill = fills_the_gpu(case) and launch.name not in _ONE_PROGRAM_PER_HEAD
        uses.append((specialize(launch), Use(case.name, batch * launch.programs, must_fill)))
    return uses
