"""What is known of the kernels: how much each may spill, and which cases they do not serve (record.json)."""

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
    """What a run is judged by.

    Args:
        versions: of the packages that the figures were taken with; others spill otherwise.
        spills: bytes per thread by case and kernel; 0 where none are given.
        limits: why a case is refused, by case.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    spills: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)

    def budget(self, case: str, kernel: str) -> int:
        """Bytes that a kernel may spill in a case."""
        return self.spills.get(case, {}).get(kernel, 0)

    def problems(self, outcome: Outcome) -> list[str]:
        """What is wrong with an outcome, in words."""
        if outcome.status == "refused":
            return [] if self.limits.get(outcome.name) == outcome.message else [f"refused: {outcome.message}"]
        if outcome.status == "failed":
            return [outcome.message]
        found = [refusal for kernel in outcome.kernels for refusal in kernel.refusals]
        for kernel, spill in spills_of(outcome).items():
            budget = self.budget(outcome.name, kernel)
            if spill > budget:
                found.append(f"{kernel} spills {spill} bytes, its budget is {budget}")
        return found

    def improvements(self, outcome: Outcome) -> list[str]:
        """Where an outcome is better than recorded, in words."""
        if outcome.status != "compiled":
            return []
        found = ["no longer refused"] if outcome.name in self.limits else []
        for kernel, spill in spills_of(outcome).items():
            budget = self.budget(outcome.name, kernel)
            if spill < budget:
                found.append(f"{kernel} spills {spill} bytes of the {budget} recorded")
        return found


def spills_of(outcome: Outcome) -> dict[str, int]:
    """Bytes that each kernel spills; the most where a program holds a kernel in several forms."""
    found: dict[str, int] = {}
    for kernel in outcome.kernels:
        found[kernel.name] = max(kernel.spill, found.get(kernel.name, 0))
    return found


def load() -> Record:
    """The record in the package."""
    return Record(**json.loads(FILE.read_text(encoding="utf-8")))


def save(path: Path, outcomes: Iterable[Outcome], versions: Mapping[str, str]) -> None:
    """Writes down a run as what is known."""
    record: dict[str, Any] = {"versions": dict(versions), "spills": {}, "limits": {}}
    for outcome in outcomes:
        if outcome.status == "refused":
            record["limits"][outcome.name] = outcome.message
        spills = {kernel: spill for kernel, spill in spills_of(outcome).items() if spill}
        if outcome.status == "compiled" and spills:
            record["spills"][outcome.name] = spills
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
