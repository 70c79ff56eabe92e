"""Compilation of one kernel by Triton and its assembler, with what they say of it."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import resource
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pallas_kernels.aot.assembler import parse
from triton_kernels.aot import sass
from triton_kernels.aot.specialization import Specialization
from triton_kernels.common.installation import VARIABLE

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TRITON_ALWAYS_COMPILE": "1",  # a cached kernel would take no time
    "TRITON_DUMP_PTXAS_LOG": "1",
    "TRITON_DEFAULT_FP_FUSION": "1",  # in words, or Triton 3.9 warns
}
_VERSIONS = ("jax", "triton")


@dataclass
class Kernel:
    """Resources that a kernel needs on the GPU.

    Args:
        registers: per thread.
        spill_stores: bytes per thread that are stored because the registers do not hold them.
        spill_loads: bytes per thread that are loaded back.
        in_loops: instructions inside of loops that load or store spilled values.
        outside: instructions outside of loops that do.
        shared_memory: bytes per block.
        threads: per block.
        seconds: of CPU to compile it, in Triton and the assembler.
        remarks: warnings of the assembler.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    in_loops: int
    outside: int
    shared_memory: int
    threads: int
    seconds: float
    remarks: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """Result of compiling a kernel.

    Args:
        kernel: what it needs; None if it does not compile.
        message: of the exception; empty if there was none.
    """

    kernel: Kernel | None = None
    message: str = ""


def missing() -> str | None:
    """Return what this process lacks to compile, None if it lacks nothing."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton: pip install 'osdn-jax[triton]', in a checkout make aot-triton"
    if os.environ.get(VARIABLE) == "1":
        return f"cannot compile in a process started with {VARIABLE}=1: unset it"
    return None


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that determine the compiled code."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS}


def prepare_environment() -> None:
    """Set the variables with which Triton reports on each kernel, here and in child processes."""
    os.environ |= _ENVIRONMENT


def compile_kernel(specialization: Specialization, capability: int) -> Outcome:
    """Compile a kernel. Errors are returned in the outcome, not raised.

    Args:
        specialization: to compile.
        capability: compute capability times 10 of the GPU.
    """
    try:
        return Outcome(_compile(specialization, capability))
    except Exception as error:  # noqa: BLE001 (any error of the compiler is to be reported)
        return Outcome(message=f"{type(error).__name__}: {error}")


def _compile(specialization: Specialization, capability: int) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    source, options = specialization.source(), specialization.options()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        before = _cpu_seconds()
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        seconds = _cpu_seconds() - before
    functions = parse(log.getvalue().replace("ptxas-blackwell", "ptxas"))  # the assembler from capability 9.0 on
    if not any(function.registers for function in functions):
        raise RuntimeError(f"the assembler said nothing of the kernel: {log.getvalue()!r}")
    spills = sass.spills(disassemble(compiled.asm["cubin"]))
    return Kernel(
        registers=max(function.registers for function in functions),
        spill_stores=sum(function.spill_stores for function in functions),
        spill_loads=sum(function.spill_loads for function in functions),
        in_loops=spills.inside,
        outside=spills.outside,
        shared_memory=compiled.metadata.shared,
        threads=32 * specialization.warps,
        seconds=seconds,
        remarks=[remark for function in functions for remark in function.remarks],
    )


def disassemble(cubin: bytes) -> str:
    """Return the machine code of a compiled kernel as text."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _cpu_seconds() -> float:
    """Return the processor time of this process and of the children that have ended, such as the assembler."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
