"""The record of a run as Markdown, short enough to be read at the end of a log."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu import floors
from benchmarks.gpu.plan import CONTENDERS, PROGRAMS, Row, is_of
from osdn_jax.comparison import parse_shapes

LONGEST = 110  # characters of a reason
_SHORT = {"forward": "f", "forward + backward": "f+b"}


def markdown(record: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the file."""
    rows: Sequence[Row] = record["rows"]
    about = record["environment"]
    yield "# Kernels on a GPU"
    yield ""
    yield f"{about['date']}, {about['device']}, driver {about['driver'] or 'unknown'}; jax {about['jax']}, jaxlib"
    yield f"{about['jaxlib']}, Python {about['python']}; " + ", ".join(
        f"{name} {version or 'not installed'}" for name, version in about["packages"].items()
    )
    yield f"Ours: {about['implementation']}."
    yield f"`{about['command']}`, {record['seconds']:.0f} s of {record['budget']:.0f} s."
    checks = [row for row in rows if row["section"] == "check"]
    if checks:
        yield from _checks(checks)
    times = [row for row in rows if row["section"] == "time"]
    if times:
        yield from _times(times, next((row for row in rows if row["section"] == "ceilings"), None))
    yield from _reasons(rows)


def _checks(rows: Sequence[Row]) -> Iterator[str]:
    passed = sum(row["status"] == "pass" for row in rows)
    yield from ("", f"## Against the float32 scan: {passed} of {len(rows)} pass", "")
    yield "bfloat16; the worst relative error of outputs, final state and gradients over the seeds, beside its limit."
    yield from ("", "| case | keys | | worst error | limit | in | same bits twice |", "|---|---|---|---:|---:|---|---|")
    for row in rows:
        status = row["status"] if row["status"] == "pass" else f"**{row['status']}**"
        cells = [row["case"], row["keys"], status]
        if "error" in row:
            cells += [f"{row['error']:.1e}", f"{row['limit']:.0e}", row["worst"], "yes" if row["same"] else "**no**"]
        yield f"| {' | '.join(cells)} |" + " |" * (7 - len(cells))


def _times(rows: Sequence[Row], ceilings: Row | None) -> Iterator[str]:
    yield from ("", "## Time", "")
    rates = None
    if ceilings and "bytes_per_second" in ceilings:
        rates = floors.Ceilings(ceilings["bytes_per_second"], ceilings["flops_per_second"])
        yield f"Ceilings measured here: copy {rates.bytes / 1e12:.2f} TB/s, matmul {rates.flops / 1e12:.0f} TFLOP/s."
    else:
        yield "No ceilings: " + (ceilings or {}).get("reason", "not measured") + "."
    yield "f: forward, f+b: forward and backward. ±: half the quartiles' distance. ns: per head and token. mem, flop:"
    yield "parts of our time that the floors are. FLA, XLA: times, and over ours. h: host-bound. ≠: outputs 3 % apart."
    yield from ("", "| | ours ms | ± | ns | mem | flop | FLA ms | /ours | XLA ms | /ours |", "|---|" + "---:|" * 9)
    shape = None
    for row in rows:
        if (row["contender"], row["program"]) != (CONTENDERS[0], PROGRAMS[0]):
            continue
        if row["shape"] != shape:
            shape = row["shape"]
            yield f"| **{shape}** |" + " |" * 9
        for program in PROGRAMS:
            yield _line(row, program, rows, rates)


def _line(row: Row, program: str, rows: Sequence[Row], rates: floors.Ceilings | None) -> str:
    key = {"shape": row["shape"], "rule": row["rule"], "program": program}
    found = [next((x for x in rows if is_of(x, {**key, "contender": c})), {"status": "?"}) for c in CONTENDERS]
    ours = found[0]
    cells = [f"{row['rule']} {_SHORT[program]}", *_milliseconds(ours), "", "", ""]
    seconds = ours.get("median_seconds")
    if seconds:
        cells[3] = f"{floors.per_head_and_token(seconds, parse_shapes(row['shape'])[0]):.2f}"
        if rates:
            moved, done = floors.shares(seconds, ours["bytes"], ours["flops"], rates)
            cells[4:] = [f"{moved:.0%}", f"{done:.0%}"]
    for other in found[1:]:
        cells += [_milliseconds(other)[0], ""]
        if seconds and other.get("median_seconds"):
            cells[-1] = f"{other['median_seconds'] / seconds:.2f}"
    return f"| {' | '.join(cells)} |"


def _milliseconds(row: Row) -> tuple[str, str]:
    if row["status"] != "measured":
        return row["status"], ""
    low, high = row["quartile_seconds"]
    marks = "h" * row["host_bound"] + "≠" * ((row["difference"] or 0.0) > 0.03)
    return f"{row['median_seconds'] * 1e3:.3f}{marks}", f"{(high - low) / 2 / row['median_seconds']:.1%}"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Each reason once, with the first of the places that it explains."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            parts = [row[name] for name in ("case", "keys", "shape", "rule", "program", "contender") if name in row]
            places.setdefault((row["status"], row["reason"]), []).append(" ".join(parts) or row["section"])
    if places:
        yield from ("", "## Not measured or not passed", "")
    for (status, reason), where in places.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        shown = reason if len(reason) <= LONGEST else reason[: LONGEST - 1] + "…"
        yield f"- {status}: {where[0]}{more}: {shown}"
