"""The results of a run as a table on a terminal, as a Markdown page and as JSON data."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from pallas_kernels.aot import occupancy
from triton_kernels.aot.gpus import GPUS
from triton_kernels.aot.launches import Trace
from triton_kernels.aot.record import Record
from triton_kernels.aot.results import Result

COLUMNS = (
    "registers",
    "spill stores",
    "spill loads",
    "spills in loops",
    "shared memory",
    "blocks",
    "CPU s",
    "cases",
)
_MESSAGE_LINES = 12  # of an exception, in the output


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Args:
        gpu: name of the GPU.
        traces: of the cases.
        results: of the kernels.
        record: that they are judged by.
        versions: of the packages.
    """

    gpu: str
    traces: Sequence[Trace]
    results: Sequence[Result]
    record: Record
    versions: Mapping[str, str]

    def problems(self) -> list[str]:
        """Return a message for everything that is wrong."""
        messages = []
        for trace in self.traces:
            if trace.status == "failed" or (
                trace.status == "refused" and self.record.refusals.get(trace.case) != trace.message
            ):
                messages.append(f"{trace.case}: {trace.status}: {trace.message}")
        for result in self.results:
            messages += [f"{result.label}: {text}" for text in self.problems_of(result)]
        return messages

    def problems_of(self, result: Result) -> list[str]:
        """Return a message for everything that is wrong with a kernel."""
        return self.record.problems(result, self.gpu, GPUS[self.gpu])

    def line(self, result: Result) -> str:
        """Return a kernel and what is wrong with it, in one line."""
        problems = [_shortened(text).partition("\n")[0] for text in self.problems_of(result)]
        return f"{result.label}: {'; '.join(problems) or 'ok'}"

    def improvements(self) -> list[str]:
        """Return a message for everything that is better than recorded."""
        better = [
            trace.case for trace in self.traces if trace.status == "traced" and trace.case in self.record.refusals
        ]
        messages = [f"{case}: no longer refused" for case in better]
        for result in self.results:
            messages += [f"{result.label}: {text}" for text in self.record.improvements(result, self.gpu)]
        return messages

    @property
    def title(self) -> str:
        """Return the title of a report."""
        return f"Assembler report of the Triton kernels, {self.gpu.upper()}"

    def summary(self) -> str:
        """Return a summary in one or two sentences."""
        wrong = len(self.problems())
        text = f"{len(self.traces)} cases, {len(self.results)} kernels: "
        text += f"{wrong} problem{'s' * (wrong > 1)}." if wrong else "all within their limits."
        if self.record.versions and self.record.versions != self.versions:
            text += f" The record was taken with {_list(self.record.versions)}; here is {_list(self.versions)}."
        return text

    def as_data(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Return the data that --json writes."""
        kernels = []
        for result in self.results:
            data = dataclasses.asdict(result)
            if (kernel := result.outcome.kernel) is not None:
                data["outcome"]["kernel"]["blocks"] = self._blocks(result)
                data["outcome"]["kernel"]["remarks"] = kernel.remarks
            kernels.append(data | {"problems": self.problems_of(result)})
        failed = {trace.case: trace.message for trace in self.traces if trace.status != "traced"}
        return {**about, "cases": len(self.traces), "not_compiled": failed, "kernels": kernels}

    def show(self, console: Console) -> None:
        """Print the table, the assembler's remarks, the differences from the record and everything that is wrong."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("kernel", overflow="fold")
        for name in COLUMNS:
            table.add_column(name, justify="right")
        table.add_column("result")
        for result in self.results:
            table.add_row(result.label, *self._row(result), self._verdict(result))
        console.print(table)
        lines = [f"{count} × the assembler: {remark}" for remark, count in self._remarks()]
        lines += [f"better: {text}" for text in self.improvements()]
        lines += [f"wrong: {_shortened(text)}" for text in self.problems()]
        for line in [*lines, self.summary()]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def as_markdown(self, about: Mapping[str, Any]) -> str:
        """Return the Markdown page that --markdown writes."""
        lines = [
            f"# {self.title}",
            "",
            f"{about['date']}, {_list(self.versions)}:",
            f"`{about['command']}`.",
            "Compiled without a GPU; nothing ran. Registers and spills (in bytes) are per thread; spills in loops are",
            "instructions; shared memory (in bytes) is per block; blocks is the number that one multiprocessor holds",
            "at once; CPU s is the processor time to compile.",
            "",
            "| kernel | " + " | ".join(COLUMNS) + " | result |",
            "| --- |" + " ---: |" * len(COLUMNS) + " --- |",
        ]
        for result in self.results:
            lines.append("| " + " | ".join((result.label, *self._row(result), self._verdict(result))) + " |")
        remarks = [f"- {count} × {remark}" for remark, count in self._remarks()]
        if remarks:
            lines += ["", "Remarks of the assembler:", "", *remarks]
        return "\n".join([*lines, "", self.summary()]) + "\n"

    def _blocks(self, result: Result) -> int:
        kernel = result.outcome.kernel
        if kernel is None:
            return 0
        limits = GPUS[self.gpu].multiprocessor
        return occupancy.blocks(kernel.registers, kernel.threads, kernel.shared_memory, limits)

    def _row(self, result: Result) -> tuple[str, ...]:
        """Return what `COLUMNS` say of a kernel."""
        kernel, cases = result.outcome.kernel, str(len(result.cases))
        if kernel is None:
            return (*[""] * (len(COLUMNS) - 1), cases)
        figures = (kernel.registers, kernel.spill_stores, kernel.spill_loads, kernel.in_loops)
        shared, blocks = f"{kernel.shared_memory:,}", str(self._blocks(result))
        return (*map(str, figures), shared, blocks, f"{kernel.seconds:.1f}", cases)

    def _verdict(self, result: Result) -> str:
        if result.outcome.kernel is None:
            return "failed"
        return "over its limits" if self.problems_of(result) else "ok"

    def _remarks(self) -> list[tuple[str, int]]:
        """Return the different remarks with their counts, the most frequent first."""
        kernels = [result.outcome.kernel for result in self.results]
        return Counter(remark for kernel in kernels if kernel for remark in kernel.remarks).most_common()


def _list(versions: Mapping[str, str]) -> str:
    """Return versions as "name version, name version"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _shortened(text: str) -> str:
    """Return the first lines of a message; the data hold the whole message."""
    lines = text.splitlines()
    return "\n".join(lines[:_MESSAGE_LINES] + ["..."] * (len(lines) > _MESSAGE_LINES))
