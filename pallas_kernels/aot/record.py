"""The recorded spill budget of every kernel and the cases that the kernels refuse (record.json)."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pallas_kernels.aot.compiler import Outcome

FILE = resources.files("pallas_kernels.aot") / "record.json"


@dataclass(frozen=True)
class Record:
    """The figures that a run is judged by.

    Args:
        versions: of the packages that the figures were measured with; spills differ between compiler versions.
        spills: bytes per thread by case and kernel; a kernel without an entry may not spill.
        limits: the message with which a case is expected to be refused, by case.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    spills: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)

    def budget(self, case: str, kernel: str) -> int:
        """Return the bytes per thread that a kernel may spill in a case."""
        return self.spills.get(case, {}).get(kernel, 0)

    def problems(self, outcome: Outcome) -> list[str]:
        """Return a message for everything that is wrong with an outcome."""
        if outcome.status == "refused":
            return [] if self.limits.get(outcome.name) == outcome.message else [f"refused: {outcome.message}"]
        if outcome.status == "failed":
            return [outcome.message]
        messages = [refusal for kernel in outcome.kernels for refusal in kernel.refusals]
        for kernel, spill in spills_of(outcome).items():
            budget = self.budget(outcome.name, kernel)
            if spill > budget:
                messages.append(f"{kernel} spills {spill} bytes, its budget is {budget}")
        return messages

    def improvements(self, outcome: Outcome) -> list[str]:
        """Return a message for everything in an outcome that is better than recorded."""
        if outcome.status != "compiled":
            return []
        messages = ["no longer refused"] if outcome.name in self.limits else []
        for kernel, spill in spills_of(outcome).items():
            budget = self.budget(outcome.name, kernel)
            if spill < budget:
                messages.append(f"{kernel} spills {spill} bytes of the {budget} recorded")
        return messages


def spills_of(outcome: Outcome) -> dict[str, int]:
    """Return the bytes that each kernel spills, the maximum if a program holds a kernel in several forms."""
    spills: dict[str, int] = {}
    for kernel in outcome.kernels:
        spills[kernel.name] = max(kernel.spill, spills.get(kernel.name, 0))
    return spills


def load() -> Record:
    """Load the record that the package ships."""
    return Record(**json.loads(FILE.read_text(encoding="utf-8")))


def save(path: Path, outcomes: Iterable[Outcome], versions: Mapping[str, str]) -> None:
    """Write the outcomes of a run as the record that later runs are judged by."""
    record: dict[str, Any] = {"versions": dict(versions), "spills": {}, "limits": {}}
    for outcome in outcomes:
        if outcome.status == "refused":
            record["limits"][outcome.name] = outcome.message
        spills = {kernel: spill for kernel, spill in spills_of(outcome).items() if spill}
        if outcome.status == "compiled" and spills:
            record["spills"][outcome.name] = spills
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
