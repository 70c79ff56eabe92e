"""Results as a table for the terminal, and the format of its numbers."""

import os
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from osdn_jax.compare.measure import Result
from osdn_jax.console import PipedConsole

_WIDTH = 132  # columns, if the output is a file or a pipe
_COLUMNS = ("implementation", "error", "worst in", "compile", "time", "quartiles", "temporary", "speed-up")
_LEFT = ("implementation", "worst in")  # aligned left; the others are numbers
_DROPPED = ("quartiles", "compile", "worst in", "temporary", "speed-up")  # in a narrow window, in this order
_GAP = "  "


def console() -> Console:
    """Return the console of the table; it is 132 columns wide unless a terminal or COLUMNS sets the width."""
    ours = PipedConsole(markup=False)  # [triton] in a message is no markup
    return ours if ours.is_terminal or "COLUMNS" in os.environ else PipedConsole(width=_WIDTH, markup=False)


def result_table(results: Sequence[Result], width: int = _WIDTH) -> Text:
    """Return the table: a block of rows for each rule, shape and type.

    If the window is too narrow for all columns, some are left out, and named below the table; digits never are.

    Args:
        results: what was measured, in the order of the rows.
        width: columns of the window.
    """
    gradient = bool(results) and results[0].gradient
    title = "Forward and backward pass" if gradient else "Forward pass"
    rows = [_row(r) for r in results]
    columns, left_out = _fitting(rows, width)
    widths = {column: max(cell_len(row[column].plain) for row in [_HEADER, *rows]) for column in columns}
    lines = [
        Text(f"{title}: error against the float64 scan, cost under jit", style="italic"),
        Text(),
        _line(_HEADER, widths),
        Text("─" * (sum(widths.values()) + len(_GAP) * (len(widths) - 1))),
    ]
    pairs = zip(results, rows, strict=True)
    for (rule, shape, dtype), block in groupby(pairs, key=lambda pair: (pair[0].rule, pair[0].shape, pair[0].dtype)):
        lines += [Text(f"{rule} {shape} {dtype}", style="bold"), *(_line(row, widths) for _, row in block), Text()]
    if left_out:
        lines.append(Text(f"Not shown in {width} columns: {', '.join(left_out)}; --json has all.", style="dim"))
    return Text("\n").join(lines)


def _fitting(rows: Sequence[dict[str, Text]], width: int) -> tuple[list[str], list[str]]:
    """Return the columns that fit into a window, and those that do not."""
    columns, left_out = list(_COLUMNS), []
    for column in (*_DROPPED, ""):
        needed = sum(max(cell_len(row[name].plain) for row in [_HEADER, *rows]) for name in columns)
        if needed + len(_GAP) * (len(columns) - 1) <= width or not column:
            break
        columns.remove(column)
        left_out.append(column)
    return columns, left_out


def _line(row: dict[str, Text], widths: dict[str, int]) -> Text:
    cells = []
    for column, width in widths.items():
        cell = row[column].copy()
        space = width - cell_len(cell.plain)
        if column in _LEFT:
            cell.pad_right(space)
        else:
            cell.pad_left(space)
        cells.append(cell)
    line = Text(_GAP).join(cells)
    line.rstrip()
    return line


def refusals(results: Iterable[Result]) -> list[str]:
    """Return why cases were not served, a line each: a cell of the table is too short for it."""
    return [f"{_case(r)}: not served: {r.refusal}" for r in results if r.refusal]


def failures(results: Iterable[Result]) -> list[str]:
    """Return a line for each result with an error that exceeds its tolerance."""
    return [
        f"{_case(r)}: error {r.error:.1e} in {r.worst} exceeds its tolerance of {r.tolerance:.0e}"
        for r in results
        if not r.passed
    ]


def _case(r: Result) -> str:
    return f"{r.rule} {r.shape} {r.dtype} {r.implementation}"


_HEADER = {column: Text(column, style="bold") for column in _COLUMNS}


def _row(r: Result) -> dict[str, Text]:
    """Return the cells of a result by column."""
    cells = [Text(f"  {r.implementation}"), *(Text(cell) if isinstance(cell, str) else cell for cell in _cells(r))]
    return dict(zip(_COLUMNS, cells, strict=True))


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
    """Return three digits and a unit; nothing for None.

    Example:
        >>> duration(0.0123)
        '12.3 ms'
    """
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def size(count: float | None) -> str:
    """Return three digits and a unit of powers of 1,000; nothing for None.

    Example:
        >>> size(3_113_000_000)
        '3.11 GB'
    """
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _scaled(value: float | None, units: Sequence[tuple[str, float]]) -> str:
    if value is None:
        return ""
    unit, factor = next(((u, f) for u, f in units if value >= 0.9995 * f), units[-1])
    number = value / factor
    digits = 0 if number >= 99.95 or number == int(number) else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f} {unit}"
