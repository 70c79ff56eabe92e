"""Kernels against a reference on the same rounded inputs: values, gradients, and the same bits in a second run.

The reference, or judge, of a case is the scan in float32, or a loop in NumPy and float64.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import loop
from benchmarks.gpu.cases import CASES, DRY_CASES, KEYS, Case, cases_of, draw, outputs
from osdn_jax._errors import joined_lines
from osdn_jax.compare import value_and_gradient
from osdn_jax.compare.inputs import Arrays
from osdn_jax.compare.measure import relative_error
from osdn_jax.ops import gram, hypergradient

__all__ = ["CASES", "DRY_CASES", "KEYS", "Case", "draw"]

LIMIT, GATE_LIMIT = 1e-2, 2e-2
# Of the limits: float16 has three more bits than bfloat16; products of float32 are in tf32x3, or better.
_FACTORS = {"bfloat16": 1.0, "float16": 0.3, "float32": 1e-3}
GATES = ("d_beta", "d_log_decay", "d_log_forget", "d_gain", "d_center")

NumpyProgram = Callable[[Arrays, np.ndarray | None, Arrays], dict[str, np.ndarray]]


def both(case: Case, implementation: str) -> NumpyProgram:
    """Return a function (arguments, ids, cotangents) -> outputs, and gradients as d_ARGUMENT; compiled once."""

    @jax.jit
    def run(x: Arrays, ids: jax.Array | None, cotangents: Arrays) -> tuple[dict[str, jax.Array], Arrays]:
        if not case.gradient:
            return outputs(case, x, ids, implementation), {}
        return value_and_gradient(lambda y: outputs(case, y, ids, implementation))(x, cotangents)

    def by_name(x: Arrays, ids: np.ndarray | None, cotangents: Arrays) -> dict[str, np.ndarray]:
        values, gradients = run(x, ids, cotangents)
        named = {**values, **{f"d_{name}": g for name, g in gradients.items()}}
        return {name: np.asarray(value) for name, value in named.items()}

    return by_name


def judge_of(case: Case) -> NumpyProgram:
    """Return the reference of a case."""
    if case.judge == "numpy":
        return lambda x, ids, cotangents: loop.value_and_gradient(x, cotangents, erase=case.erase)
    if case.preset is not None:
        return both(case, "scan")
    # The gradient of a scan keeps a state for each token, so it runs one sequence at a time.
    one = both(dataclasses.replace(case, batch=1), "scan")

    def by_sequence(x: Arrays, ids: np.ndarray | None, cotangents: Arrays) -> dict[str, np.ndarray]:
        found = []
        for i in range(case.batch):
            row = slice(i, i + 1)
            arguments, pulled = ({name: a[row] for name, a in arrays.items()} for arrays in (x, cotangents))
            found.append(one(arguments, None if ids is None else ids[row], pulled))
        return {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}

    return by_sequence


def judge(errors: dict[str, float], dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the error that uses most of its limit, and whether all errors are within their limits."""
    limits = {name: _FACTORS[dtype] * (GATE_LIMIT if name in GATES else LIMIT) for name in errors}
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    kept = all(errors[name] <= limits[name] for name in errors)
    return {"worst": worst, "error": errors[worst], "limit": limits[worst], "kept": kept}


def compare(
    case: Case,
    keys: str,
    seeds: int,
    kernel: NumpyProgram,
    reference: NumpyProgram,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return the errors of a kernel's program, the largest over the seeds, and whether two runs agree bit by bit."""
    errors: dict[str, float] = {}
    same, start = True, time.perf_counter()
    for seed in range(seeds):
        arrays, ids = draw(case, keys, seed)
        cotangents = draw_cotangents(case, arrays, ids, seed)
        first = kernel(arrays, ids, cotangents)
        alive()
        again = kernel(arrays, ids, cotangents)
        alive()
        same = same and all(first[name].tobytes() == again[name].tobytes() for name in first)
        with jax.default_matmul_precision("highest"):
            expected = reference(_float32(arrays), ids, _float32(cotangents))
        alive()
        for name in first:
            errors[name] = max(errors.get(name, 0.0), relative_error(first[name], expected[name].astype(np.float64)))
    verdict = judge(errors, case.dtype)
    status = "pass" if verdict.pop("kept") and same else "fail"
    seconds = round(time.perf_counter() - start, 1)
    return {"status": status, **verdict, "same": same, "errors": errors, "seeds": seeds, "seconds": seconds}


def draw_cotangents(case: Case, arrays: Arrays, ids: np.ndarray | None, seed: int) -> Arrays:
    """Draw cotangents in the shapes and types of a case's outputs from a normal distribution."""
    rng = np.random.default_rng([seed, 1])
    shapes = jax.eval_shape(lambda x, i: outputs(case, x, i, "scan"), arrays, ids)
    return {name: rng.normal(size=x.shape).astype(x.dtype) for name, x in shapes.items()}


def job(spec: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Emit a row for each distribution of keys."""
    case = cases_of(spec["section"], spec["dry"], spec["implementation"])[spec["case"]]
    kernel, reference = both(case, spec["implementation"]), judge_of(case)
    for keys in spec["keys"]:
        key = {"section": spec["section"], "case": spec["case"], "keys": keys}
        known = (gram if case.preset == "gram" else hypergradient).IMPLEMENTATIONS
        if case.preset and spec["implementation"] not in known:
            reason = f"the preconditioner has no implementation {spec['implementation']!r}"
            emit({**key, "status": "absent", "reason": reason})
            continue
        try:
            found = compare(case, keys, spec["seeds"], kernel, reference, lambda: emit({"event": "alive"}))
            emit({**key, **found})
        except Exception as error:  # noqa: BLE001 - any exception of a kernel is its result
            emit({**key, "status": "raised", "reason": words(error)})


def words(error: BaseException) -> str:
    """Return an exception in one line."""
    return f"{type(error).__name__}: {joined_lines(error)[:400]}"


def _float32(arrays: Arrays) -> Arrays:
    return {name: x.astype(np.float32) for name, x in arrays.items()}
