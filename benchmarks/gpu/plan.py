"""What the suite does, in order of importance, as jobs: each is a process of its own."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.check import CASES, DRY_CASES, KEYS

SECTIONS = ("check", "time")
RULES = ("delta_net", "gated_delta_net", "kda", "osdn", "osdn_trust", "pgdn", "pkda")
SHAPES = ("B1T8192H64D128", "B8T4096H16D128", "B1T32768H8D128", "B16T2048H8D128")
DRY_SHAPES = ("B1T64H1D64",)
SEEDS = 3

FORWARD, BOTH = "forward", "forward + backward"
PROGRAMS = (FORWARD, BOTH)
CONTENDERS = ("ours", "peer", "xla")

OUT_OF_TIME = "not measured: out of time"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """A process: what it is told, and the keys of the rows that it owes."""

    spec: Row
    owed: tuple[Row, ...]

    def __str__(self) -> str:
        spec = self.spec
        return " ".join(str(spec[name]) for name in ("kind", "case", "shape", "rule") if name in spec)


def stages(sections: Iterable[str], rules: Sequence[str], implementation: str, dry: bool) -> list[list[Job]]:
    """Correctness, the ceilings, ours and the peers, shape by shape; then the XLA form, shape by shape."""
    first, second = [], []
    common = {"dry": dry, "implementation": implementation}
    if "check" in sections:
        for case in DRY_CASES if dry else CASES:
            owed = tuple({"section": "check", "case": case, "keys": keys} for keys in KEYS)
            first.append(Job({**common, "kind": "check", "case": case, "seeds": 1 if dry else SEEDS}, owed))
    if "time" in sections:
        first.append(Job({**common, "kind": "ceilings"}, ({"section": "ceilings"},)))
        for shape in DRY_SHAPES if dry else SHAPES:
            for rule in rules:
                for stage, contenders in ((first, CONTENDERS[:2]), (second, CONTENDERS[2:])):
                    key = {"section": "time", "shape": shape, "rule": rule}
                    owed = tuple({**key, "program": p, "contender": c} for p in PROGRAMS for c in contenders)
                    spec = {"kind": "time", "shape": shape, "rule": rule, "contenders": contenders}
                    stage.append(Job({**common, **spec}, owed))
    return [first, second]


def place(row: Row) -> tuple:
    """Sorts rows by importance, whatever came first: sections, then cases or shapes as they are listed."""
    section = ("check", "ceilings", "time").index(row["section"])
    if row["section"] == "check":
        return section, [*CASES, *DRY_CASES].index(row["case"]), KEYS.index(row["keys"])
    if row["section"] == "ceilings":
        return (section,)
    shape = [*SHAPES, *DRY_SHAPES].index(row["shape"])
    program, contender = PROGRAMS.index(row["program"]), CONTENDERS.index(row["contender"])
    return section, shape, RULES.index(row["rule"]), program, contender


def is_of(row: Row, key: Row) -> bool:
    """Whether a row is the one that a key asks for."""
    return all(row.get(name) == value for name, value in key.items())


def missing_rows(owed: Iterable[Row], rows: Sequence[Row], status: str, reason: str) -> list[Row]:
    """Rows that say why there is nothing else for a key."""
    return [{**key, "status": status, "reason": reason} for key in owed if not any(is_of(row, key) for row in rows)]
