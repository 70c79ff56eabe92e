"""Compilation of one case for a GPU that is not present, with the compiler's output captured.

The settings that the compiler needs must be made before JAX starts (`prepare_environment`).
"""

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pallas_kernels.aot.assembler import Kernel, of_program, parse
from pallas_kernels.aot.cases import Case

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_TARGETS = resources.files("pallas_kernels") / "targets"
_COMPILER = {
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # otherwise the plugin looks for a driver
}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cuda,cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",  # the only output with the shared memory of a launch
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
# Collectives that move arguments between GPUs; all-reduce is allowed, for sums.
_MOVES = re.compile(r"\b(all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
_KNOWN: dict[str, Kernel] = {}  # kernels that this process has compiled, by the hash of their code
_VERSIONS = ("jax", "jaxlib", "nvidia-cuda-nvcc", "nvidia-nvjitlink")


@dataclass
class Outcome:
    """Result of compiling one case.

    Args:
        name: of the case.
        status: "compiled", "refused" (the function raised NotImplementedError) or "failed" (any other error).
        seconds: time to trace, lower and compile.
        kernels: that were compiled.
        message: of the exception; empty if there was none.
    """

    name: str
    status: str
    seconds: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    message: str = ""


def described() -> list[str]:
    """Return the names of the GPUs that `pallas_kernels/targets` describes; XLA compiles for all of them."""
    return sorted(file.name.removesuffix(".txtpb") for file in _TARGETS.iterdir() if file.name.endswith(".txtpb"))


def targets() -> list[str]:
    """Return the names of those for which the kernels are written, GPUs of compute capability 9.0."""
    return [name for name in described() if "cuda_compute_capability { major: 9 " in description(name)]


def description(gpu: str) -> str:
    """Return the description of a GPU, one of `described`, as XLA reads it."""
    return (_TARGETS / f"{gpu}.txtpb").read_text(encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that determine the compiled code."""
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def has_plugin() -> bool:
    """Return True if JAX can compile for NVIDIA GPUs."""
    return any(_find_spec(name) is not None for name in PLUGINS)


def prepare_environment() -> None:
    """Set the variables with which JAX, XLA and Mosaic GPU report on each kernel, here and in child processes."""
    os.environ |= _ENVIRONMENT
    prepare_compiler()


def prepare_compiler() -> None:
    """Set the variables for compiling for a GPU that is not present. Call this before JAX starts."""
    os.environ |= _COMPILER
    # Some jaxlib releases run the first ptxas on PATH: make that the one of this environment.
    for name in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        spec = _find_spec(name)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / "bin" / "ptxas").exists():
                os.environ["PATH"] = f"{Path(folder) / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
                return


def _find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return the spec of a module, None if the module or its parent is not installed."""
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent is not installed
        return None


def compile_case(case: Case, gpu: str) -> Outcome:
    """Compile a case for a GPU of `targets`. Errors are returned in the outcome, not raised."""
    start = time.perf_counter()
    status, message, program = "compiled", "", ""
    with tempfile.TemporaryFile() as output:
        try:
            with _captured_output(output.fileno()):
                program = _compile(case, gpu)
        except NotImplementedError as error:
            status, message = "refused", str(error)
        except Exception as error:  # noqa: BLE001 (any error of the compiler is to be reported)
            status, message = "failed", f"{type(error).__name__}: {error}"
        output.seek(0)
        kernels = parse(output.read().decode(errors="replace"))
    if status == "compiled":
        try:
            kernels = of_program(program, kernels, _KNOWN)
        except LookupError as error:
            status, message = "failed", str(error)
    return Outcome(case.name, status, time.perf_counter() - start, kernels, message)


def _compile(case: Case, gpu: str) -> str:
    """Return the compiled HLO of a case."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels.aot.programs import program, splits

    mesh = _mesh(gpu, 2 if case.sharded else 1)
    function, arguments = program(case)
    specs = splits(case, arguments, "x") if case.sharded else jax.tree.map(lambda _: PartitionSpec(), arguments)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    arguments = jax.tree.map(place, arguments, specs)
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    if moves := sorted(set(_MOVES.findall(text))):
        raise RuntimeError(f"the program for two GPUs moves arguments between them: {', '.join(moves)}")
    return text


@functools.cache
def _mesh(gpu: str, count: int) -> Any:
    """Return a mesh of described GPUs with one axis, "x"."""
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(described_devices(gpu, per_host=count)), ("x",))


def described_devices(gpu: str, hosts: int = 1, per_host: int = 1) -> list[Any]:
    """Return devices to compile for, without those GPUs, numbered host by host.

    Args:
        gpu: one of `described`.
        hosts: number of hosts; default 1.
        per_host: GPUs per host; default 1.
    """
    from jax.experimental import topologies

    shape, config = f"1x{hosts}x{per_host}", description(gpu)
    return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=config).devices)


@contextlib.contextmanager
def _captured_output(file: int) -> Iterator[None]:
    """Redirect stdout and stderr of this process to a file descriptor, including output of C++ code."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(stream) for stream in (1, 2)]
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
