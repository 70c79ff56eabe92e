"""Compiles a case, in a process that has set what the compiler needs before JAX starts, and catches what is printed."""

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
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # the plugin looks for a driver otherwise
}
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cuda,cpu",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_HOST_LLVM": "1",  # the only place that tells how much shared memory a launch asks for
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
_MOVES = re.compile(r"\b(all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")  # not sums
_KNOWN: dict[str, Kernel] = {}  # by the hash of their code
_VERSIONS = ("jax", "jaxlib", "nvidia-cuda-nvcc", "nvidia-nvjitlink")


@dataclass
class Outcome:
    """What became of a case.

    Args:
        name: of the case.
        status: "compiled"; "refused": the function raised NotImplementedError; "failed": anything else.
        seconds: to trace, lower and compile.
        kernels: what was compiled.
        message: of the exception.
    """

    name: str
    status: str
    seconds: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    message: str = ""


def targets() -> list[str]:
    """The GPUs that there is a description of."""
    return sorted(file.name.removesuffix(".txtpb") for file in _TARGETS.iterdir() if file.name.endswith(".txtpb"))


def versions() -> dict[str, str]:
    """The packages that decide what code comes out, where they are installed."""
    found = {}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def has_plugin() -> bool:
    """Whether JAX can compile for GPUs of NVIDIA."""
    return any(_found(name) is not None for name in PLUGINS)


def prepare_environment() -> None:
    """Sets what JAX, XLA and Mosaic GPU read, for this process and those that it starts; they print what they do."""
    os.environ |= _ENVIRONMENT
    prepare_compiler()


def prepare_compiler() -> None:
    """Sets what they need to compile for a GPU that is not here, before JAX starts."""
    os.environ |= _COMPILER
    # Some releases of jaxlib run the first ptxas on PATH: that of this environment, whatever else is installed.
    for name in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        spec = _found(name)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / "bin" / "ptxas").exists():
                os.environ["PATH"] = f"{Path(folder) / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
                return


def _found(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # not even its parent
        return None


def compile_case(case: Case, gpu: str) -> Outcome:
    """Compiles a case for a GPU of `targets`; whatever goes wrong is in the outcome."""
    start = time.perf_counter()
    status, message, program = "compiled", "", ""
    with tempfile.TemporaryFile() as output:
        try:
            with _captured(output.fileno()):
                program = _compile(case, gpu)
        except NotImplementedError as error:
            status, message = "refused", str(error)
        except Exception as error:  # noqa: BLE001 (whatever the compiler raises is what is to be reported)
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
        raise RuntimeError(f"the program of two GPUs moves arguments between them: {', '.join(moves)}")
    return text


@functools.cache
def _mesh(gpu: str, count: int) -> Any:
    import jax
    import numpy as np

    return jax.sharding.Mesh(np.array(described_devices(gpu, per_host=count)), ("x",))


def described_devices(gpu: str, hosts: int = 1, per_host: int = 1) -> list[Any]:
    """GPUs of `targets` that need not be here, numbered host by host."""
    from jax.experimental import topologies

    description = (_TARGETS / f"{gpu}.txtpb").read_text(encoding="utf-8")
    shape = f"1x{hosts}x{per_host}"
    return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=description).devices)


@contextlib.contextmanager
def _captured(file: int) -> Iterator[None]:
    """Sends what this process prints to a file, from C++ too."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    for stream in (1, 2):
        os.dup2(file, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
