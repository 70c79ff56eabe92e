"""Results as a table for the terminal, and how numbers are written."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from osdn_jax.comparison.measure import Result

_WIDTH = 132  # of a table that goes to a file or a pipe


def console() -> Console:
    """A console that leaves a table its width where nobody's window says otherwise."""
    ours = Console()
    return ours if ours.is_terminal else Console(width=_WIDTH)


def result_table(results: Sequence[Result]) -> Table:
    """A block of rows per rule, shape and type, under its name."""
    gradient = bool(results) and results[0].gradient
    title = "Forward and backward pass" if gradient else "Forward pass"
    table = Table(
        title=f"{title}: error against the float64 scan, cost under jit", box=SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("implementation", no_wrap=True)
    for column in ("error", "worst in", "compile", "time", "quartiles", "temporary", "speed-up"):
        table.add_column(column, justify="left" if column == "worst in" else "right", no_wrap=True)
    for (rule, shape, dtype), block in groupby(results, key=lambda r: (r.rule, r.shape, r.dtype)):
        table.add_row(Text(f"{rule} {shape} {dtype}", style="bold"))
        rows = list(block)
        for i, row in enumerate(rows):
            table.add_row(f"  {row.implementation}", *_cells(row), end_section=i == len(rows) - 1)
    return table


def refusals(results: Iterable[Result]) -> list[str]:
    """Why cases were not served, in full: a cell of the table is short."""
    return [f"{_case(r)}: not served: {r.refusal}" for r in results if r.refusal]


def failures(results: Iterable[Result]) -> list[str]:
    """What passed its tolerance."""
    return [
        f"{_case(r)}: error {r.error:.1e} in {r.worst} passes its tolerance of {r.tolerance:.0e}"
        for r in results
        if not r.passed
    ]


def _case(r: Result) -> str:
    return f"{r.rule} {r.shape} {r.dtype} {r.implementation}"


def _cells(r: Result) -> list[str | Text]:
    if r.refusal is not None:
        left_out = [Text("not served", style="yellow"), Text("see below", style="yellow")]
        return [*left_out, duration(r.compile_seconds), "", "", size(r.temporary_bytes), ""]
    style = "green" if r.passed else "bold red"
    return [
        Text("" if r.error is None else f"{r.error:.1e}", style=style),
        Text(r.worst or "", style=style),
        duration(r.compile_seconds),
        duration(r.median_seconds),
        "" if r.quartile_seconds is None else "–".join(duration(x) for x in r.quartile_seconds).replace(" ", ""),
        size(r.temporary_bytes),
        "" if r.speed_up is None else f"{r.speed_up:.2f} ×",
    ]


def duration(seconds: float | None) -> str:
    """Three digits and a unit."""
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def size(count: float | None) -> str:
    """Three digits and a unit, by thousands."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _scaled(value: float | None, units: Sequence[tuple[str, float]]) -> str:
    if value is None:
        return ""
    unit, factor = next(((u, f) for u, f in units if value >= 0.9995 * f), units[-1])
    number = value / factor
    digits = 0 if number >= 99.95 or number == int(number) else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {unit}"
