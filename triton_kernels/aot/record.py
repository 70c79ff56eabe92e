"""The limits that every kernel is held to, and the recorded exceptions with their reasons (record.json)."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from triton_kernels.aot.gpus import GPU
from triton_kernels.aot.results import Result

FILE = resources.files("triton_kernels.aot") / "record.json"
SECONDS = 10.0  # of CPU that a kernel may take to compile; each process compiles each kernel again


@dataclass(frozen=True)
class Record:
    """The exceptions that a run is judged by.

    Args:
        versions: of the packages that they were measured with; spills differ between compiler versions.
        spills: spill instructions that a kernel may have inside of loops and the reason, by GPU and label of the
            kernel: `{"instructions": 2, "reason": "..."}`. A kernel without an entry may have none.
        refusals: the message with which a case is expected to be refused, by case.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    spills: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)

    def budget(self, gpu: str, label: str) -> int:
        """Return the number of spill instructions that a kernel may have inside of loops."""
        return int(self.spills.get(gpu, {}).get(label, {}).get("instructions", 0))

    def problems(self, result: Result, name: str, gpu: GPU) -> list[str]:
        """Return a message for everything that is wrong with a kernel.

        Args:
            result: of compiling it.
            name: of the GPU.
            gpu: its limits.
        """
        kernel = result.outcome.kernel
        if kernel is None:
            return [result.outcome.message]
        messages = []
        budget = self.budget(name, result.label)
        if kernel.in_loops > budget:
            messages.append(f"{kernel.in_loops} spill instructions in loops, its budget is {budget}")
        if kernel.seconds > SECONDS:
            messages.append(f"takes {kernel.seconds:.1f} s of CPU to compile, the limit is {SECONDS:g}")
        if kernel.shared_memory > gpu.shared_memory:
            has = f"a block may have {gpu.shared_memory:,}"
            messages.append(f"needs {kernel.shared_memory:,} bytes of shared memory, {has}")
        for use in result.uses:
            if use.must_fill and use.programs < gpu.multiprocessors:
                has = f"the GPU has {gpu.multiprocessors} multiprocessors"
                messages.append(f"has {use.programs} programs in {use.case}, {has}")
        return messages

    def improvements(self, result: Result, name: str) -> list[str]:
        """Return a message for everything that is better than recorded."""
        kernel, budget = result.outcome.kernel, self.budget(name, result.label)
        if kernel is None or kernel.in_loops >= budget:
            return []
        return [f"{kernel.in_loops} spill instructions in loops of the {budget} recorded"]


def load() -> Record:
    """Load the record that the package ships."""
    return Record(**json.loads(FILE.read_text(encoding="utf-8")))


def save(
    path: Path, results: Iterable[Result], gpu: str, versions: Mapping[str, str], refusals: Mapping[str, str]
) -> None:
    """Write the results of a run as the record that later runs are judged by.

    What other GPUs spill stays, and so do the reasons. A new entry has an empty reason, which is to be filled in.

    Args:
        path: of the file.
        results: of the run.
        gpu: that it compiled for.
        versions: of the packages.
        refusals: the message by case that was refused.
    """
    known = load()
    reasons = {label: entry["reason"] for label, entry in known.spills.get(gpu, {}).items()}
    spills: dict[str, Any] = {}
    for result in results:
        kernel = result.outcome.kernel
        if kernel is not None and kernel.in_loops:
            spills[result.label] = {"instructions": kernel.in_loops, "reason": reasons.get(result.label, "")}
    every = {name: entries for name, entries in {**known.spills, gpu: spills}.items() if entries}
    record = {"versions": dict(versions), "spills": every, "refusals": dict(refusals)}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
