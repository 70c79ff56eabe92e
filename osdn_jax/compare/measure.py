"""Errors, times and memory of several implementations of one rule, compiled, and interleaved in one process."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from osdn_jax.compare.float64_scan import reference
from osdn_jax.compare.inputs import (
    Arrays,
    Shape,
    draw_cotangents,
    draw_inputs,
    program,
    value_and_gradient,
)
from osdn_jax.compare.machine import available_bytes
from osdn_jax.compare.tolerances import tolerance
from osdn_jax.ops import mosaic_gpu
from osdn_jax.ops.delta_rule import IMPLEMENTATIONS

AUTO = "auto"
BASELINE = "scan"
_SHORTEST = 2e-3  # seconds: calls that take less are timed several at once


def implementations() -> list[str]:
    """Every registered implementation of the delta rule, and "auto" for the choice by device and shape."""
    return [*IMPLEMENTATIONS, AUTO]


def usual() -> list[str]:
    """What to compare unless told otherwise: no interpreter, and kernels on their own device only."""
    elsewhere = {"mosaic_gpu_interpret"} if mosaic_gpu.on_hopper() else {"mosaic_gpu_interpret", "mosaic_gpu"}
    return [name for name in implementations() if name not in elsewhere]


@dataclasses.dataclass
class Contender:
    """A compiled program and its arguments, or why there is none, and what it costs."""

    name: str
    arguments: tuple[Any, ...]
    compiled: Callable[..., Any] | None = None
    refusal: str | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table. Times are in seconds; what was not measured is None."""

    rule: str
    shape: str
    sizes: dict[str, int]
    dtype: str
    implementation: str
    gradient: bool  # whether the program is the forward and backward pass or the forward pass alone
    refusal: str | None = None  # why the implementation cannot serve this case
    error: float | None = None  # the worst of `errors`, each as a part of its tolerance
    worst: str | None = None  # its name: o, memory, preconditioner, or d_ and the argument of the gradient
    tolerance: float | None = None
    errors: dict[str, float] | None = None
    compile_seconds: float | None = None
    median_seconds: float | None = None
    quartile_seconds: tuple[float, float] | None = None
    temporary_bytes: int | None = None
    speed_up: float | None = None  # over the scan: median over rounds of the ratio within the round

    @property
    def passed(self) -> bool:
        """Whether no error exceeds its tolerance."""
        return self.error is None or self.tolerance is None or self.error <= self.tolerance


def compare_implementations(
    rule: str,
    shape: Shape,
    dtype: str,
    names: Sequence[str],
    *,
    gradient: bool = False,
    repeats: int = 10,
    seed: int = 0,
) -> list[Result]:
    """Compares implementations on one rule, shape and type: a result for each, the scan first.

    Where inputs or the float64 scan need more memory than there is, each result is a refusal that says so.

    Args:
        rule: one of COMPARED_RULES.
        shape: the sizes.
        dtype: float64, float32 or bfloat16.
        names: of `implementations()`. The scan always runs, as what the speed-up is over.
        gradient: the forward and backward pass, not the forward pass alone.
        repeats: rounds of timing; in each one every implementation runs once, one after the other.
        seed: of the inputs.
    """
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    try:
        running, errors = _run(rule, shape, dtype, names, gradient, repeats, seed)
    except MemoryError as error:
        running, errors = [Contender(name, (), refusal=_line(error)) for name in names], {}
    baseline = running[0].seconds
    return [
        Result(
            rule=rule,
            shape=str(shape),
            sizes=shape.sizes(),
            dtype=dtype,
            implementation=c.name,
            gradient=gradient,
            refusal=c.refusal,
            **(_judged(errors[c.name], dtype) if c.name in errors else {}),
            compile_seconds=c.compile_seconds,
            median_seconds=float(np.median(c.seconds)) if c.seconds else None,
            quartile_seconds=quartiles(c.seconds) if c.seconds else None,
            temporary_bytes=c.temporary_bytes,
            speed_up=ratio(baseline, c.seconds) if baseline and c.seconds else None,
        )
        for c in running
    ]


def _run(
    rule: str, shape: Shape, dtype: str, names: Sequence[str], gradient: bool, repeats: int, seed: int
) -> tuple[list[Contender], dict[str, dict[str, float]]]:
    """(what ran, its errors by name). Raises MemoryError where there is nothing to compare with."""
    with jax.enable_x64(dtype == "float64"):
        arrays = draw_inputs(rule, shape, dtype, seed)
        outputs = jax.eval_shape(program(rule, BASELINE), arrays)
        cotangents = draw_cotangents(outputs, dtype, seed) if gradient else None
        expected = _by_name(reference(rule, arrays, cotangents))

        functions: dict[str, Callable[..., Any]] = {}
        for name in names:
            run = program(rule, None if name == AUTO else name)
            functions[name] = run if cotangents is None else value_and_gradient(run)
        arguments = jax.device_put((arrays,) if cotangents is None else (arrays, cotangents))
        running = [contender(name, f, arguments) for name, f in functions.items()]
        errors: dict[str, dict[str, float]] = {}
        for c in running:
            try:
                if c.compiled is not None:
                    errors[c.name] = _errors(c, expected)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                c.compiled, c.refusal = None, _line(error)
        take_turns(running, repeats)
    return running, errors


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or f"it raises {type(error).__name__}"


def contender(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Contender:
    """Compiles a function for its arguments. What raises NotImplementedError becomes a refusal in its words."""
    new = Contender(name, arguments)
    start = time.perf_counter()
    try:
        lowered = jax.jit(function).lower(*arguments)
    except NotImplementedError as error:
        new.refusal = _line(error)
        return new
    compiled = lowered.compile()
    new.compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is not None:
        new.temporary_bytes = memory.temp_size_in_bytes
        needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
        available = available_bytes() if jax.default_backend() == "cpu" else None
        if available is not None and needed > 0.9 * available:
            new.refusal = f"it needs {needed / 1e9:.1f} GB of memory where {available / 1e9:.1f} GB are free"
            return new
    new.compiled = compiled
    return new


def take_turns(running: Sequence[Contender], repeats: int) -> None:
    """Times A B C A B C ...: whatever slows the machine for a while slows all of them alike.

    Each timed turn follows an untimed call of the same program: one that has just returned gigabytes to the system
    would else be paid for by the next (beside a scan of 2 GB, chunks took 370 ms instead of 200).
    """
    able = [(c, c.compiled) for c in running if c.compiled is not None]
    counts = []
    for c, compiled in able:
        jax.block_until_ready(compiled(*c.arguments))  # the first call touches the memory
        counts.append(max(1, round(_SHORTEST / _seconds(compiled, c.arguments, 1))))
    for _ in range(repeats):
        for (c, compiled), count in zip(able, counts, strict=True):
            jax.block_until_ready(compiled(*c.arguments))
            c.seconds.append(_seconds(compiled, c.arguments, count))


def _seconds(compiled: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> float:
    """Of one call, by the mean of several in a row."""
    start = time.perf_counter()
    for _ in range(count):
        jax.block_until_ready(compiled(*arguments))
    return max(time.perf_counter() - start, 1e-9) / count


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return float(low), float(high)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of two contenders' times, round by round."""
    return float(np.median(np.asarray(over) / np.asarray(under)))


def relative_error(got: Any, want: np.ndarray) -> float:
    """‖got − want‖ / ‖want‖, or ‖got‖ where want is zero; infinite where a number is missing."""
    got = np.asarray(got).astype(np.float64)
    norm = np.linalg.norm(want)
    error = float(np.linalg.norm(got - want) / (norm if norm > 0 else 1.0))
    return error if np.isfinite(error) else float("inf")


def _by_name(pair: tuple[Arrays, Arrays]) -> Arrays:
    outputs, gradients = pair
    return {**outputs, **{f"d_{name}": x for name, x in gradients.items()}}


def _errors(contender: Contender, expected: Arrays) -> dict[str, float]:
    if contender.compiled is None:
        return {}
    results = contender.compiled(*contender.arguments)
    got = _by_name(results if len(contender.arguments) == 2 else (results, {}))
    return {name: relative_error(got[name], want) for name, want in expected.items()}


def _judged(errors: dict[str, float], dtype: str) -> dict[str, Any]:
    """The error that uses most of its tolerance."""
    allowed = {name: tolerance(dtype, name) for name in errors}
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    return {"errors": errors, "error": errors[worst], "worst": worst, "tolerance": allowed[worst]}
