"""Programs of another machine in place of the Triton kernels, and the calls that the suite needs programs for."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import timing
from benchmarks.gpu.cases import KEYS, cases_of, draw, outputs
from benchmarks.gpu.choice import TRITON
from benchmarks.gpu.plan import BOTH, Request, Row, plan_stage
from osdn_jax.compare import parse_shapes, value_and_gradient
from osdn_jax.ops import triton
from triton_kernels import exported
from triton_kernels.common.target import INTERPRETER

STAGES = ("smoke", "check", "ours")  # those that run the kernels first; the peers' stage runs the same programs


def described(folder: Path, capability: int | None) -> str:
    """Return what a folder of programs holds, in one line that tells it from another.

    Args:
        folder: written by `python -m triton_kernels.export`.
        capability: of this GPU, times 10; None if it has none.

    Raises:
        ValueError: there are no programs, or they are for other GPUs.
    """
    found = exported.Programs(folder)
    if capability != found.capability:
        here = "none" if capability is None else capability / 10
        raise ValueError(f"got {folder}, for compute capability {found.capability / 10}; this GPU has {here}")
    digest = hashlib.sha256()
    for file in [exported.INDEX, *sorted(found.files.values())]:
        try:
            digest.update((folder / file).read_bytes())
        except OSError as error:
            raise ValueError(f"got {folder}, whose {file} cannot be read: {error.strerror}") from error
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    return f"{len(found.files)} programs, {digest.hexdigest()[:12]}, by {versions}"


def write_calls(file: Path, stages: Sequence[str], rules: Sequence[str], pattern: str) -> int:
    """Write the calls that the kernels get in some stages, for `python -m triton_kernels.export`; return their number.

    The stages are traced. Nothing is compiled or run, and neither a GPU nor Triton is needed.

    Args:
        file: to write, a list in JSON.
        stages: those of `STAGES` among them have calls.
        rules: to time.
        pattern: of the cases.
    """
    request = Request(TRITON, dry=False, rules=rules, cases=pattern)
    jax.clear_caches()  # what was traced before would not be recorded
    with _no_gpu_needed(), exported.recorded() as calls:
        for spec in _specs(stages, request):
            _trace(spec)
    jax.clear_caches()
    file.write_text(json.dumps([call.as_data() for call in calls], indent=1) + "\n", encoding="utf-8")
    return len(calls)


@contextlib.contextmanager
def _no_gpu_needed() -> Iterator[None]:
    """Let calls be traced on a machine without a GPU."""
    before = triton._machine_limitation, triton._target
    triton._machine_limitation, triton._target = lambda interpret: None, lambda interpret: INTERPRETER
    try:
        yield
    finally:
        triton._machine_limitation, triton._target = before


def _specs(stages: Sequence[str], request: Request) -> Iterator[Row]:
    for stage in STAGES:
        if stage in stages:
            for job in plan_stage(stage, (), request).jobs:
                yield job.spec


def _trace(spec: Row) -> None:
    if spec["kind"] == "check":
        _trace_case(spec)
    elif spec["kind"] == "time":
        shape = parse_shapes(spec["shape"])[0]
        arguments = timing.abstract(spec["rule"], shape)
        cotangent = jax.ShapeDtypeStruct(timing.output_shape(shape), jnp.bfloat16)
        for program in dict.fromkeys(program for _, program in spec["timed"]):
            both = program == BOTH
            run = timing.program_of(spec["rule"], TRITON, both)
            jax.eval_shape(run, *((arguments, cotangent) if both else (arguments,)))


def _trace_case(spec: Row) -> None:
    case = cases_of(spec["section"], spec["dry"], TRITON)[spec["case"]]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), draw(case, KEYS[0], 0))
    if not case.gradient:
        jax.eval_shape(lambda x, ids: outputs(case, x, ids, TRITON), *shapes)
        return
    cotangents = jax.eval_shape(lambda x, ids: outputs(case, x, ids, "scan"), *shapes)

    def both(x, ids, pulled):
        return value_and_gradient(lambda y: outputs(case, y, ids, TRITON))(x, pulled)

    jax.eval_shape(both, *shapes, cotangents)
