"""The record of all stages as Markdown, short enough for the end of a log."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu import roofline
from benchmarks.gpu.cases import KEYS, cases_of
from benchmarks.gpu.plan import CONTENDERS, NOT_RUN, PROGRAMS, Row, is_of, rank
from osdn_jax import hardware
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
    packages = [name for name in identity if name not in ("device", "implementation", "source", "dry", "programs")]
    yield "# Kernels on a GPU"
    yield ""
    yield f"{identity['device']}; {identity['implementation']}, sources {identity['source']}; " + ", ".join(
        f"{name} {identity[name] or 'not installed'}" for name in packages
    )
    yield ""
    yield from _what_ran(identity)
    for call in record["calls"]:
        where = f"commit {call['commit'] or 'unknown'}, driver {call['driver'] or 'unknown'}"
        yield f"- {call['date']}, {where}: `{call['command']}`, {call['seconds']:.0f} s of {call['budget']:.0f} s"
    length = next(iter(cases_of("smoke", identity["dry"]).values())).length
    yield from _checks("smoke", f"Smoke: every kernel once, T = {length}", rows)
    yield from _checks("check", "Against the reference", rows)
    times = [row for row in rows if row["section"] == "time"]
    if times:
        yield from _times(times, next((row for row in rows if row["section"] == "ceilings"), None), identity)
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


def _what_ran(identity: Mapping[str, Any]) -> Iterator[str]:
    if identity["dry"]:
        yield "Dry run on a CPU: tiny shapes, kernels in their interpreter. It says nothing about a GPU."
        yield ""
    if identity.get("programs"):
        yield f"The Triton kernels were exported on another machine: {identity['programs']}."
        yield "Their gradients keep only the arguments of the forward pass, and run again what else they need of it."
        yield ""


def _times(rows: Sequence[Row], ceilings: Row | None, identity: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "## Time", "")
    rates, said = _ceilings(ceilings, identity["device"])
    yield said
    yield "f: forward, f+b: forward and backward. ±: half the interquartile range. ns: per head and token. mem, flop:"
    yield "roofline bounds as fractions of our time. Others: their times, and the ratios to ours of the same rounds."
    yield "h: host-bound. ≠: outputs or gradients differ from those of the XLA form by more than 3 %."
    others = sorted({row["contender"] for row in rows} | set(CONTENDERS), key=rank)[1:]
    names = {"peer": "FLA", "xla": "XLA"}
    columns = [f"{identity['implementation']} ms", "±", "ns", "mem", "flop"]
    columns += [text for other in others for text in (f"{names.get(other, other)} ms", "/ours")]
    yield from ("", f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns))
    shape = None
    for pair in dict.fromkeys((row["shape"], row["rule"]) for row in rows):
        if pair[0] != shape:
            shape = pair[0]
            yield f"| **{shape}** |" + " |" * len(columns)
        for program in PROGRAMS:
            yield _line(*pair, program, rows, rates, others)


def _ceilings(row: Row | None, device: str) -> tuple[roofline.Ceilings | None, str]:
    """Return the rates that bounds are computed with, those of the data sheet if none were measured, and say which."""
    sheet = hardware.gpu_of(device)
    told = "" if sheet is None else f"{sheet.memory_bandwidth / 1e12:.2f} TB/s, {sheet.flops / 1e12:.0f} TFLOP/s"
    if row and "bytes_per_second" in row:
        rates = roofline.Ceilings(row["bytes_per_second"], row["flops_per_second"])
        said = f"Ceilings measured here: copy {rates.bytes / 1e12:.2f} TB/s, matmul {rates.flops / 1e12:.0f} TFLOP/s"
        return rates, said + (f"; the data sheet says {told}." if told else ".")
    reason = (row or {}).get("reason", "not measured")
    if sheet is None:
        return None, f"No ceilings: {reason}."
    rates = roofline.Ceilings(sheet.memory_bandwidth, sheet.flops)
    return rates, f"Ceilings of the data sheet: {told}; those of this device: {reason}."


def _line(
    shape: str,
    rule: str,
    program: str,
    rows: Sequence[Row],
    rates: roofline.Ceilings | None,
    others: Sequence[str],
) -> str:
    key = {"shape": shape, "rule": rule, "program": program}
    found = [next((x for x in rows if is_of(x, {**key, "contender": c})), {"status": ""}) for c in ("ours", *others)]
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
