"""A run as a table for a terminal, as a page and as data."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pallas_kernels.aot.compiler import Outcome
from pallas_kernels.aot.record import Record

COLUMNS = ("kernel", "registers", "spill stores", "spill loads", "shared memory", "blocks", "barriers", "remarks")

_LINES = 12  # of an exception's message


def as_data(outcomes: Sequence[Outcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """What --json writes."""
    cases = [dataclasses.asdict(outcome) for outcome in outcomes]
    for case, outcome in zip(cases, outcomes, strict=True):
        for data, kernel in zip(case["kernels"], outcome.kernels, strict=True):
            data |= {"threads": kernel.threads, "blocks": kernel.blocks}
    return {**about, "cases": cases}


def show(console: Console, outcomes: Sequence[Outcome], record: Record, title: str) -> None:
    """Prints the table, the assembler's remarks and what is wrong or better than recorded."""
    table = Table(title=title, title_justify="left")
    table.add_column("case, kernel", overflow="fold")
    for name in COLUMNS[1:]:
        table.add_column(name, justify="right")
    table.add_column("result")
    for outcome in outcomes:
        table.add_row(outcome.name, *[""] * len(COLUMNS[1:]), _result(outcome, record))
        for kernel, *numbers in _rows(outcome):
            table.add_row(f"  {kernel}", *numbers)
        table.add_section()
    console.print(table)
    lines = [f"{count} × the assembler: {remark}" for remark, count in _remarks(outcomes)]
    for outcome in outcomes:
        lines += [f"better: {outcome.name}: {text}" for text in record.improvements(outcome)]
    for outcome in outcomes:
        lines += [f"wrong: {outcome.name}: {_start(text)}" for text in record.problems(outcome)]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def summary(outcomes: Sequence[Outcome], record: Record, versions: Mapping[str, str]) -> str:
    """A run in a sentence or two."""
    kernels = sum(len(outcome.kernels) for outcome in outcomes)
    wrong = sum(bool(record.problems(outcome)) for outcome in outcomes)
    text = f"{len(outcomes)} cases, {kernels} kernels: {f'{wrong} wrong' if wrong else 'all as recorded'}."
    if record.versions and record.versions != versions:
        text += f" The budgets were taken with {_list(record.versions)}; here is {_list(versions)}."
    return text


def as_markdown(outcomes: Sequence[Outcome], record: Record, about: Mapping[str, Any]) -> str:
    """What --markdown writes."""
    lines = [
        f"# What the assembler says of the kernels, {about['gpu'].upper()}",
        "",
        f"{about['date']}, {_list(about['versions'])}:",
        f"`{about['command']}`.",
        "Compiled without a GPU. Registers and spills (in bytes) are per thread, shared memory (in bytes) and named",
        "barriers per block; blocks are those that one multiprocessor holds at once.",
        "",
        "| case | " + " | ".join(COLUMNS) + " | result |",
        "| --- | --- |" + " ---: |" * (len(COLUMNS) - 1) + " --- |",
    ]
    for outcome in outcomes:
        for number, row in enumerate(_rows(outcome) or [("",) * len(COLUMNS)]):
            ends = (outcome.name, _result(outcome, record)) if number == 0 else ("", "")
            lines.append("| " + " | ".join((ends[0], *row, ends[1])) + " |")
    remarks = [f"- {count} × {remark}" for remark, count in _remarks(outcomes)]
    if remarks:
        lines += ["", "Remarks of the assembler:", "", *remarks]
    return "\n".join(lines) + "\n"


def _rows(outcome: Outcome) -> list[tuple[str, ...]]:
    rows = []
    for kernel in outcome.kernels:
        numbers = (kernel.registers, kernel.spill_stores, kernel.spill_loads)
        shared = "?" if kernel.shared_memory is None else f"{kernel.shared_memory:,}"
        blocks = "?" if kernel.blocks is None else str(kernel.blocks)
        rest = (str(kernel.barriers), str(len(kernel.remarks) or ""))
        rows.append((kernel.name, *map(str, numbers), shared, blocks, *rest))
    return rows


def _result(outcome: Outcome, record: Record) -> str:
    if outcome.status == "failed":
        return "failed"
    if outcome.status == "refused":
        return "refused" if record.problems(outcome) else "known limit"
    return "over budget" if record.problems(outcome) else "ok"


def _list(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _start(text: str) -> str:
    """The first lines of a message; all of it is in the data."""
    lines = text.splitlines()
    return "\n".join(lines[:_LINES] + ["..."] * (len(lines) > _LINES))


def _remarks(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    counts = Counter(remark for outcome in outcomes for kernel in outcome.kernels for remark in kernel.remarks)
    return counts.most_common()
