"""Errors, times and memory of several implementations of one rule, compiled and interleaved in one process."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from osdn_jax._errors import joined_lines
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
from osdn_jax.compare.timing import Timed, ratio, take_turns
from osdn_jax.compare.tolerances import tolerance
from osdn_jax.ops import selection
from osdn_jax.ops.delta_rule_operator import IMPLEMENTATIONS

AUTO = "auto"
BASELINE = "scan"
_SHORTEST = 2e-3  # seconds: of shorter calls one measurement times several


def implementations() -> list[str]:
    """Return the registered implementations of the delta rule, and "auto" for the choice by device and shape."""
    return [*sorted(IMPLEMENTATIONS, key=lambda name: name not in (BASELINE, "chunk")), AUTO]


def default_implementations() -> list[str]:
    """Return those compared by default: no interpreter, and kernels only on the device they are for."""
    for_this_device = {"mosaic_gpu": selection.on_hopper(), "triton": selection.on_triton_gpu()}
    names = [name for name in implementations() if not name.endswith("_interpret")]
    return [name for name in names if for_this_device.get(name, True)]


@dataclasses.dataclass
class Contender(Timed):
    """A compiled program, its arguments and its costs, or the reason why it cannot run.

    Args:
        name: its label.
        arguments: what it is called with.
        compiled: the program; None if it cannot run.
        refusal: the reason why it cannot run, if it cannot.
        compile_seconds: time of lowering and compilation.
        temporary_bytes: the compiler's count of temporary memory.
    """

    name: str
    arguments: tuple[Any, ...]
    compiled: Callable[..., Any] | None = None
    refusal: str | None = None
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    calls: int = 1  # per measurement

    @property
    def ready(self) -> bool:
        """True if there is a program to run."""
        return self.compiled is not None

    def settle(self) -> None:
        """Call it once, which touches the memory, and time a second call to choose the number per measurement."""
        self._seconds(1)
        self.calls = max(1, round(_SHORTEST / self._seconds(1)))

    def measure(self) -> float:
        """Return the mean seconds of `calls` calls, after one that is not timed.

        A program that has just returned gigabytes to the system would otherwise slow the next one: after a scan of
        2 GB, chunks took 370 ms instead of 200.
        """
        self._seconds(1)
        return self._seconds(self.calls)

    def _seconds(self, calls: int) -> float:
        compiled, arguments = self.compiled, self.arguments
        if compiled is None:
            raise RuntimeError(f"{self.name}: cannot run: {self.refusal}")
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(compiled(*arguments))
        return max(time.perf_counter() - start, 1e-9) / calls


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table. Times are in seconds; what was not measured is None.

    Args:
        rule: a key of `COMPARED_RULES`.
        shape: the shape as text.
        sizes: its sizes by letter.
        dtype: float64, float32 or bfloat16.
        implementation: its name.
        gradient: True for the forward and backward pass, False for the forward pass alone.
        refusal: the reason why the implementation cannot run this case, if it cannot.
        error: the error that uses most of its tolerance.
        worst: its name: o, state, preconditioner, or d_ and the argument of the gradient.
        tolerance: its tolerance.
        errors: every error by name.
        compile_seconds: time of lowering and compilation.
        median_seconds: median run time.
        quartile_seconds: first and third quartile of the run time.
        temporary_bytes: the compiler's count of temporary memory.
        speed_up: over the scan: the median over rounds of the ratio within a round.
    """

    rule: str
    shape: str
    sizes: dict[str, int]
    dtype: str
    implementation: str
    gradient: bool
    refusal: str | None = None
    error: float | None = None
    worst: str | None = None
    tolerance: float | None = None
    errors: dict[str, float] | None = None
    compile_seconds: float | None = None
    median_seconds: float | None = None
    quartile_seconds: tuple[float, float] | None = None
    temporary_bytes: int | None = None
    speed_up: float | None = None

    @property
    def passed(self) -> bool:
        """True if no error exceeds its tolerance."""
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
    """Compare implementations on one rule, shape and type.

    Args:
        rule: a key of `COMPARED_RULES`.
        shape: the sizes of the inputs.
        dtype: float64, float32 or bfloat16.
        names: some of `implementations()`. The scan always runs, as the baseline of the speed-up.
        gradient: measure the forward and backward pass instead of the forward pass alone.
        repeats: number of timing rounds; in each one every implementation runs once, one after the other.
        seed: random seed of the inputs.

    Returns:
        A result for each implementation, the scan first. If the inputs or the float64 scan need more memory than is
        free, each result is a refusal that says so.

    Example:
        >>> from osdn_jax.compare import compare_implementations, parse_shapes
        >>> (shape,) = parse_shapes("B1T16H1D4")
        >>> scan, chunk = compare_implementations("delta_net", shape, "float32", ["scan", "chunk"], repeats=2)
        >>> chunk.passed, chunk.median_seconds > 0
        (True, True)
    """
    names = [BASELINE, *(name for name in names if name != BASELINE)]
    try:
        running, errors = _run(rule, shape, dtype, names, gradient, repeats, seed)
    except MemoryError as error:
        running, errors = [Contender(name, (), refusal=joined_lines(error)) for name in names], {}
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
            median_seconds=c.median_seconds,
            quartile_seconds=c.quartile_seconds,
            temporary_bytes=c.temporary_bytes,
            speed_up=ratio(baseline, c.seconds) if baseline and c.seconds else None,
        )
        for c in running
    ]


def _run(
    rule: str, shape: Shape, dtype: str, names: Sequence[str], gradient: bool, repeats: int, seed: int
) -> tuple[list[Contender], dict[str, dict[str, float]]]:
    """Return the contenders and their errors by name; raise MemoryError if the float64 scan does not fit."""
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
                c.compiled, c.refusal = None, joined_lines(error)
        take_turns(running, repeats)
    return running, errors


def contender(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Contender:
    """Compile a function for its arguments.

    Args:
        name: label of the result.
        function: a function of JAX arrays.
        arguments: its arguments.

    Returns:
        The compiled program, or a refusal: the message of a NotImplementedError, or that its memory is not free.
    """
    new = Contender(name, arguments)
    start = time.perf_counter()
    try:
        lowered = jax.jit(function).lower(*arguments)
    except NotImplementedError as error:
        new.refusal = joined_lines(error)
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


def relative_error(got: Any, want: np.ndarray) -> float:
    """Return ‖got − want‖ / ‖want‖, or ‖got‖ if want is zero; infinity if a value is not finite."""
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
    """Return the fields of a result about its errors; `error` is the one that uses most of its tolerance."""
    allowed = {name: tolerance(dtype, name) for name in errors}
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    return {"errors": errors, "error": errors[worst], "worst": worst, "tolerance": allowed[worst]}
