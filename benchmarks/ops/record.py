"""The record of the sections as Markdown, and the files of a record."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from osdn_jax.compare.report import duration, size


def write(folder: Path, name: str, record: Mapping, lines: Iterable[str]) -> None:
    """Write a record to <name>.json and its page to <name>.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def markdown(record: Mapping, headings: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the page: for each section the machine, the ratios, and the times of the programs."""
    yield "# Cost of the operators"
    yield ""
    yield "All float32 unless it says bfloat16, by `python -m benchmarks.ops`. The programs of a comparison run in"
    yield "turn in one process; a ratio is the median over rounds of the ratio within a round, a time the median over"
    yield "rounds. Other work on the machine slows all programs of a round, those on several cores most: note the load"
    yield "average."
    for name, text in headings.items():
        if name not in record:
            continue
        heading, _, more = text.partition("\n\n")
        yield from ("", f"## {heading.strip().rstrip('.')}", "")
        yield from machine(record[name]["environment"])
        if more:
            yield from ("", *(line.strip() for line in more.strip().splitlines()))
        yield from ("", *ratios(record[name]["figures"]))
        for table in record[name].get("tables", []):
            yield from ("", *table)
        if not record[name].get("tables"):
            yield from ("", *programs(record[name]["measurements"]))


def machine(about: Mapping) -> Iterator[str]:
    """Yield the date, machine, versions and command of a measurement."""
    yield f"{about['date']}, {about['device']} ({about['cpu']}, {about['cpu_cores']} cores), load average"
    yield f"{about['load_at_start']} before and {about['load_at_end']} after; jax {about['jax']}, jaxlib"
    yield f"{about['jaxlib']}, NumPy {about['numpy']}, Python {about['python']}: `{about['command']}`."


def ratios(figures: list[dict]) -> Iterator[str]:
    """Yield the table of ratios with their targets."""
    yield from ("| ratio | measured | target | |", "| --- | ---: | ---: | --- |")
    for f in figures:
        asked = f"≤ {f['at_most']:.3g}" if f["at_most"] else f"≥ {f['at_least']:.3g}" if f["at_least"] else ""
        met = {True: "met", False: "**missed**", None: ""}[f["met"]]
        yield f"| {f['what']} | {f['value']:.3g} | {asked} | {met} |"


def programs(measurements: list[dict]) -> Iterator[str]:
    """Yield the table of times and memory."""
    yield from ("| program | median | quartiles | temporary memory | compile |", "| --- " + "| ---: " * 4 + "|")
    for r in measurements:
        spread = "–".join(duration(x) for x in r["quartile_seconds"] or ())
        cost = f"{duration(r['median_seconds'])} | {spread} | {size(r['temporary_bytes'])}"
        yield f"| {r['name']} | {r['refusal'] or cost} | {duration(r['compile_seconds'])} |"
