"""Results of an evaluation: their table, and what is written to a file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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
