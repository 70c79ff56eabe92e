"""Results of an evaluation: their table, and what is written to a file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from osdn_jax.evaluation.positions import Bucket

OURS = "osdn_jax"


class Result(NamedTuple):
    """The value of one metric of a task.

    Attributes:
        task: name of the task.
        metric: name of the metric.
        value: its value; None if the task has none.
        stderr: its standard error; None if it is not known.
        n: number of documents.
        version: version of the task.
        source: who defines the task: "lm_eval" with its version, the path of a task file, or "osdn_jax".
    """

    task: str
    metric: str
    value: float | None
    stderr: float | None
    n: int
    version: str
    source: str


class Outcome(NamedTuple):
    """Results of an evaluation.

    Attributes:
        results: the values of the tasks' metrics.
        positions: {text: perplexity by position}.
        missing: {task: why it was not run}.
        about: versions and settings, as JSON can hold them.
    """

    results: list[Result]
    positions: dict[str, list[Bucket]]
    missing: dict[str, str]
    about: dict[str, Any]


def record(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON can hold it: null for numbers that JSON does not have."""
    positions = {
        name: [{**bucket._asdict(), "perplexity": bucket.perplexity} for bucket in buckets]
        for name, buckets in outcome.positions.items()
    }
    results = [result._asdict() for result in outcome.results]
    return _without_nan({**outcome.about, "results": results, "positions": positions, "missing": outcome.missing})


def _without_nan(value: Any) -> Any:
    """Return a value with null for NaN and infinity, and text for what JSON cannot hold."""
    if isinstance(value, dict):
        return {str(name): _without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def result_table(results: Sequence[Result]) -> Table:
    """Return the table of the results, one row for each metric."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("value", "stderr", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("version", "defined by"):
        table.add_column(name, no_wrap=True)
    for x in results:
        figures = (_number(x.value), _number(x.stderr), f"{x.n:,}")
        table.add_row(x.task, x.metric, *figures, x.version, Path(x.source).name)
    return table


def position_table(buckets: Sequence[Bucket]) -> Table:
    """Return the table of perplexities by position."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("tokens before", "perplexity", "nats per token", "stderr", "windows", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for x in buckets:
        places = f"{x.start:,} to {x.stop - 1:,}"
        figures = (f"{x.perplexity:.4g}", f"{x.nats:.4f}", _number(x.error), f"{x.windows:,}", f"{x.tokens:,}")
        table.add_row(places, *figures)
    return table


def _number(value: float | None) -> str:
    """Return four decimals, or four digits of a large number."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
