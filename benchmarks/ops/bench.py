"""Programs of the operators, and their measurement in turn in one process."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ops import patches
from osdn_jax.compare import (
    Contender,
    Shape,
    contender,
    draw_cotangents,
    draw_inputs,
    parse_shapes,
    program,
    take_turns,
    value_and_gradient,
)
from osdn_jax.compare.report import duration, size


@dataclasses.dataclass(frozen=True)
class Program:
    """A rule under an implementation ("auto" for the automatic choice), forward alone or with its gradient."""

    rule: str
    shape: Shape
    implementation: str = "auto"
    gradient: bool = True
    dtype: str = "float32"
    chunk_size: int | None = None
    anchor: float | None = None  # of the hypergradient preconditioner; default: that of compare.COMPARED_RULES
    direct_scores: bool = False  # form the channel decay of a chunk as C x C x K values
    packed: bool = False  # documents of about a hundred tokens
    checked: bool = True  # contain packed documents that are not finite (ops/containment.py)

    def __str__(self) -> str:
        parts = [self.rule, str(self.shape), self.implementation]
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += [f"C={self.chunk_size}"] if self.chunk_size else []
        parts += [f"anchor={self.anchor:g}"] if self.anchor is not None else []
        parts += ["direct C x C x K"] if self.direct_scores else []
        parts += ["packed"] if self.packed else []
        parts += ["unchecked"] if not self.checked else []
        return " ".join([*parts, passes(self.gradient)])

    def function(self) -> tuple[Callable, tuple[Any, ...]]:
        """Return the function and its arguments."""
        arrays, cotangents = _arguments(self.rule, self.shape, self.dtype)
        options: dict = {"chunk_size": self.chunk_size} | ({} if self.anchor is None else {"anchor": self.anchor})
        if self.packed:
            options["segment_ids"] = packed_ids(self.shape.batch, self.shape.length)
        run = program(self.rule, None if self.implementation == "auto" else self.implementation, **options)
        return (value_and_gradient(run), (arrays, cotangents)) if self.gradient else (run, (arrays,))


def passes(gradient: bool) -> str:
    """Return the words for a forward pass alone, or with its gradient."""
    return "forward + backward" if gradient else "forward"


@functools.lru_cache(maxsize=1)
def _arguments(rule: str, shape: Shape, dtype: str) -> tuple[Any, Any]:
    """Draw the arguments and cotangents, once for programs that follow each other."""
    arrays = jax.device_put(draw_inputs(rule, shape, dtype, seed=0))
    return arrays, jax.device_put(draw_cotangents(jax.eval_shape(program(rule, "scan"), arrays), dtype, seed=0))


@dataclasses.dataclass(frozen=True)
class Figure:
    """A ratio of two programs' costs, and its target if it has one."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    def met(self) -> bool | None:
        if self.at_most is None and self.at_least is None:
            return None
        return self.value <= (self.at_most or np.inf) and self.value >= (self.at_least or 0.0)


class Bench:
    """Measures programs and collects the results of a section."""

    def __init__(self, repeats: int, quick: bool) -> None:
        self.repeats, self.quick = repeats, quick
        self.rows: list[dict] = []
        self.figures: list[Figure] = []
        self.tables: list[list[str]] = []  # lines of Markdown; they replace the table of all programs

    def shape(self, full: str, quick: str) -> Shape:
        return parse_shapes(quick if self.quick else full)[0]

    def run(self, programs: Sequence[Program], repeats: int | None = None) -> list[Contender]:
        """Compile the programs and time them in turn."""
        return self.time([compiled(p) for p in programs], repeats, programs)

    def time(
        self, running: list[Contender], repeats: int | None = None, programs: Sequence[Program] | None = None
    ) -> list[Contender]:
        """Time compiled programs in turn, and record them with what is known of each."""
        take_turns(running, repeats or self.repeats)
        for index, c in enumerate(running):
            about = {} if programs is None else _about(programs[index])
            cost = {
                "compile_seconds": c.compile_seconds,
                "median_seconds": c.median_seconds,
                "quartile_seconds": c.quartile_seconds,
                "temporary_bytes": c.temporary_bytes,
                "refusal": c.refusal,
            }
            self.rows.append({"name": c.name, **about, **cost})
            said = c.refusal or f"{duration(c.median_seconds)}, {size(c.temporary_bytes)}"
            print(f"  {c.name}: {said}, compiled in {duration(c.compile_seconds)}", file=sys.stderr, flush=True)
        return running

    def figure(self, what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> None:
        if self.quick:
            at_most = at_least = None  # the targets are for the full sizes
        self.figures.append(Figure(what, value, at_most, at_least))


def _about(p: Program) -> dict:
    return {**dataclasses.asdict(p), "shape": str(p.shape), "sizes": p.shape.sizes()}


def compiled(p: Program, *, fresh: bool = True) -> Contender:
    """Return the compiled program; if it is to be fresh, nothing that was traced earlier shortens its compile time."""
    run, arguments = p.function()
    with contextlib.ExitStack() as stack:
        if p.direct_scores:
            stack.enter_context(patches.direct_scores())
        if not p.checked:
            stack.enter_context(patches.unchecked())
        if fresh:  # or an operator traced earlier would be reused, patched or not
            jax.clear_caches()
        made = contender(str(p), run, arguments)
    if fresh:
        jax.clear_caches()
    return made


def memory(numerator: Contender, denominator: Contender) -> float:
    """Return the ratio of two programs' temporary memory."""
    return (numerator.temporary_bytes or np.nan) / (denominator.temporary_bytes or np.nan)


def packed_ids(batch: int, length: int) -> jax.Array:
    """Return segment_ids [B, T] of documents of 100 tokens on average."""
    starts = np.random.default_rng(0).random((batch, length)) < 1 / 100
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
