"""The results of a run as a table on a terminal, as a Markdown page and as JSON data."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pallas_kernels.aot.compiler import Outcome
from pallas_kernels.aot.record import Record

COLUMNS = ("kernel", "registers", "spill stores", "spill loads", "shared memory", "blocks", "barriers", "remarks")

_MESSAGE_LINES = 12  # of an exception, in the output


def as_data(outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data that --json writes.

    Args:
        outcomes: of the run.
        about: command, date, GPU and versions of the run.
    """
    cases = [dataclasses.asdict(outcome) for outcome in outcomes]
    for case, outcome in zip(cases, outcomes, strict=True):
        for data, kernel in zip(case["kernels"], outcome.kernels, strict=True):
            data |= {"threads": kernel.threads, "blocks": kernel.blocks}
    return {**about, "cases": cases}


def show(console: Console, outcomes: Sequence[Outcome], record: Record, title: str) -> None:
    """Print the table, the assembler's remarks and the differences from the record.

    Args:
        console: to print to.
        outcomes: of the run.
        record: to judge them by.
        title: of the table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("case, kernel", overflow="fold")
    for name in COLUMNS[1:]:
        table.add_column(name, justify="right")
    table.add_column("result")
    for outcome in outcomes:
        table.add_row(outcome.name, *[""] * len(COLUMNS[1:]), _result(outcome, record))
        for kernel, *figures in _rows(outcome):
            table.add_row(f"  {kernel}", *figures)
        table.add_section()
    console.print(table)
    lines = [f"{count} × the assembler: {remark}" for remark, count in _remarks(outcomes)]
    for outcome in outcomes:
        lines += [f"better: {outcome.name}: {text}" for text in record.improvements(outcome)]
    for outcome in outcomes:
        lines += [f"wrong: {outcome.name}: {_shortened(text)}" for text in record.problems(outcome)]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(outcomes: Sequence[Outcome], record: Record, versions: Mapping[str, str]) -> str:
    """Return a summary of a run in one or two sentences."""
    kernels = sum(len(outcome.kernels) for outcome in outcomes)
    wrong = sum(bool(record.problems(outcome)) for outcome in outcomes)
    text = f"{len(outcomes)} cases, {kernels} kernels: {f'{wrong} wrong' if wrong else 'all as recorded'}."
    if record.versions and record.versions != versions:
        text += f" The budgets were taken with {_list(record.versions)}; here is {_list(versions)}."
    return text


def as_markdown(outcomes: Sequence[Outcome], record: Record, about: Mapping[str, Any]) -> str:
    """Return the Markdown page that --markdown writes."""
    lines = [
        f"# Assembler report of the kernels, {about['gpu'].upper()}",
        "",
        f"{about['date']}, {_list(about['versions'])}:",
        f"`{about['command']}`.",
        "Compiled without a GPU. Registers and spills (in bytes) are per thread; shared memory (in bytes) and named",
        "barriers are per block; blocks is the number of blocks that one multiprocessor holds at once.",
        "",
        "| case | " + " | ".join(COLUMNS) + " | result |",
        "| --- | --- |" + " ---: |" * (len(COLUMNS) - 1) + " --- |",
    ]
    for outcome in outcomes:
        for index, row in enumerate(_rows(outcome) or [("",) * len(COLUMNS)]):
            case, result = (outcome.name, _result(outcome, record)) if index == 0 else ("", "")
            lines.append("| " + " | ".join((case, *row, result)) + " |")
    remarks = [f"- {count} × {remark}" for remark, count in _remarks(outcomes)]
    if remarks:
        lines += ["", "Remarks of the assembler:", "", *remarks]
    return "\n".join(lines) + "\n"


def _rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """Return a row of `COLUMNS` for each kernel."""
    rows = []
    for kernel in outcome.kernels:
        figures = (kernel.registers, kernel.spill_stores, kernel.spill_loads)
        shared = "?" if kernel.shared_memory is None else f"{kernel.shared_memory:,}"
        blocks = "?" if kernel.blocks is None else str(kernel.blocks)
        barriers, remarks = str(kernel.barriers), str(len(kernel.remarks) or "")
        rows.append((kernel.name, *map(str, figures), shared, blocks, barriers, remarks))
    return rows


def _result(outcome: Outcome, record: Record) -> str:
    """Return the verdict on a case in one or two words."""
    if outcome.status == "failed":
        return "failed"
    if outcome.status == "refused":
        return "refused" if record.problems(outcome) else "known limit"
    return "over budget" if record.problems(outcome) else "ok"


def _list(versions: Mapping[str, str]) -> str:
    """Return versions as "name version, name version"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _shortened(text: str) -> str:
    """Return the first lines of a message; the data hold the whole message."""
    lines = text.splitlines()
    return "\n".join(lines[:_MESSAGE_LINES] + ["..."] * (len(lines) > _MESSAGE_LINES))


def _remarks(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    """Return the different remarks with their counts, the most frequent first."""
    counts = Counter(remark for outcome in outcomes for kernel in outcome.kernels for remark in kernel.remarks)
    return counts.most_common()
