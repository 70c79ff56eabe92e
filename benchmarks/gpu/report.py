"""The record of all stages as Markdown, short enough for the end of a log."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu import roofline
from benchmarks.gpu.cases import KEYS
from benchmarks.gpu.plan import CONTENDERS, NOT_RUN, PROGRAMS, Row, is_of
from osdn_jax.compare import parse_shapes

LONGEST = 130  # characters of a reason
APART = 0.03
_SHORT = {"forward": "f", "forward + backward": "f+b"}
_SECTIONS = ("smoke", "check", "ceilings", "time", "compile")


def markdown(record: Mapping[str, Any], sections: Collection[str] = _SECTIONS) -> Iterator[str]:
    """Yield the lines of the table.

    Args:
        record: the content of a `Record`.
        sections: those to include; default all.
    """
    rows: Sequence[Row] = [row for row in record["rows"] if row["section"] in sections]
    identity = record["identity"]
    packages = [name for name in identity if name not in ("device", "implementation", "source", "dry")]
    yield "# Kernels on a GPU"
    yield ""
    yield f"{identity['device']}; {identity['implementation']}, sources {identity['source']}; " + ", ".join(
        f"{name} {identity[name] or 'not installed'}" for name in packages
    )
    yield ""
    for call in record["calls"]:
        where = f"commit {call['commit'] or 'unknown'}, driver {call['driver'] or 'unknown'}"
        yield f"- {call['date']}, {where}: `{call['command']}`, {call['seconds']:.0f} s of {call['budget']:.0f} s"
    yield from _checks("smoke", "Smoke: every kernel once, T = 128", rows)
    yield from _checks("check", "Against the reference", rows)
    times = [row for row in rows if row["section"] == "time"]
    if times:
        yield from _times(times, next((row for row in rows if row["section"] == "ceilings"), None))
    yield from _apart(times)
    yield from _reasons(rows)


def _checks(section: str, title: str, every: Sequence[Row]) -> Iterator[str]:
    rows = [row for row in every if row["section"] == section]
    if not rows:
        return
    passed = sum(row["status"] == "pass" for row in rows)
    distributions = [keys for keys in KEYS if any(row["keys"] == keys for row in rows)]
    yield from ("", f"## {title}: {passed} of {len(rows)} pass", "")
    yield "The worst relative error of outputs, final state and gradients over the seeds, and its limit."
    yield from ("", f"| case | {' | '.join(distributions)} |", "|---|" + "---|" * len(distributions))
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [
            next((row for row in rows if (row["case"], row["keys"]) == (case, keys)), None) for keys in distributions
        ]
        yield f"| {case} | {' | '.join(_verdict(row) if row else '' for row in found)} |"


def _verdict(row: Row) -> str:
    before = "".join(f", before: {status}" for status in row.get("before", []))
    if "error" not in row:
        return f"**{row['status']}**{before}"
    text = f"{row['worst']} {row['error']:.1e} of {row['limit']:.0e}"
    other = "" if row["same"] else ", **second run differs**"
    return ("" if row["status"] == "pass" else f"**{row['status']}** ") + text + other + before


def _times(rows: Sequence[Row], ceilings: Row | None) -> Iterator[str]:
    yield from ("", "## Time", "")
    rates = None
    if ceilings and "bytes_per_second" in ceilings:
        rates = roofline.Ceilings(ceilings["bytes_per_second"], ceilings["flops_per_second"])
        yield f"Ceilings measured here: copy {rates.bytes / 1e12:.2f} TB/s, matmul {rates.flops / 1e12:.0f} TFLOP/s."
    else:
        yield "No ceilings: " + (ceilings or {}).get("reason", "not measured") + "."
    yield "f: forward, f+b: forward and backward. ±: half the interquartile range. ns: per head and token. mem, flop:"
    yield "roofline bounds as fractions of our time. FLA, XLA: their times, and the ratios to ours of the same rounds."
    yield "h: host-bound. ≠: outputs or gradients differ from those of the XLA form by more than 3 %."
    yield from ("", "| | ours ms | ± | ns | mem | flop | FLA ms | /ours | XLA ms | /ours |", "|---|" + "---:|" * 9)
    shape = None
    for pair in dict.fromkeys((row["shape"], row["rule"]) for row in rows):
        if pair[0] != shape:
            shape = pair[0]
            yield f"| **{shape}** |" + " |" * 9
        for program in PROGRAMS:
            yield _line(*pair, program, rows, rates)


def _line(shape: str, rule: str, program: str, rows: Sequence[Row], rates: roofline.Ceilings | None) -> str:
    key = {"shape": shape, "rule": rule, "program": program}
    found = [next((x for x in rows if is_of(x, {**key, "contender": c})), {"status": ""}) for c in CONTENDERS]
    ours = found[0]
    cells = [f"{rule} {_SHORT[program]}", *_milliseconds(ours), "", "", ""]
    seconds = ours.get("median_seconds")
    if seconds:
        cells[3] = f"{roofline.per_head_and_token(seconds, parse_shapes(shape)[0]):.2f}"
        if rates:
            moved, done = roofline.shares(seconds, ours["bytes"], ours["flops"], rates)
            cells[4:] = [f"{moved:.0%}", f"{done:.0%}"]
    for other in found[1:]:
        cells += [_milliseconds(other)[0], ""]
        paired = other.get("ours_seconds") or seconds  # of the same rounds, if ours ran in them
        if paired and other.get("median_seconds"):
            cells[-1] = f"{other['median_seconds'] / paired:.2f}"
    return f"| {' | '.join(cells)} |"


def _milliseconds(row: Row) -> tuple[str, str]:
    if row["status"] != "measured":
        return row["status"], ""
    low, high = row["quartile_seconds"]
    marks = "h" * row["host_bound"] + "≠" * _is_apart(row)
    return f"{row['median_seconds'] * 1e3:.3f}{marks}", f"{(high - low) / 2 / row['median_seconds']:.1%}"


def _is_apart(row: Row) -> bool:
    return (row.get("difference") or 0.0) > APART


def _apart(rows: Sequence[Row]) -> Iterator[str]:
    apart = [row for row in rows if _is_apart(row)]
    if apart:
        yield from ("", f"## More than {APART:.0%} from the XLA form", "")
    for row in apart:
        places = ", ".join(f"{name} {x:.1e}" for name, x in row["differences"].items() if x > APART)
        yield f"- {row['shape']} {row['rule']} {_SHORT[row['program']]} {row['contender']}: {places}"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Yield each reason once, with the first of the rows that it explains."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "reason" in row:
            parts = [row[name] for name in ("case", "keys", "shape", "rule", "program", "contender") if name in row]
            place = " ".join(parts if row["section"] in ("check", "time") else [row["section"], *parts])
            places.setdefault((row["status"], row["reason"]), []).append(place)
    if places:
        yield from ("", "## Not measured or not passed", "")
    for (status, reason), where in places.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        shown = reason if len(reason) <= LONGEST else reason[: LONGEST - 1] + "…"
        words = reason if status == NOT_RUN else shown
        yield f"- {status}: {where[0]}{more}: {words}"
