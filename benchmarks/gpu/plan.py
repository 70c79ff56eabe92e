"""The jobs of each stage of the suite, in order of importance; each job is a process."""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.gpu.cases import (
    CASES,
    DRY_CASES,
    DRY_SMOKE,
    DRY_TRITON_CASES,
    KEYS,
    SMOKE,
    TRITON_CASES,
    Case,
    cases_of,
)
from benchmarks.gpu.peers import NO_PEER, PEERS
from osdn_jax.compare import parse_shapes

STAGES = ("smoke", "check", "ours", "peers-compile", "peers")
SECTIONS = {"smoke": "smoke", "check": "check", "ours": "time", "peers-compile": "compile", "peers": "time"}
SHAPES = (
    "B1T8192H64D128",
    "B1T8192H64Hk16D128",  # 16 key heads for 64 value heads, as in the published figures
    "B8T4096H16D128",
    "B1T32768H8D128",
    "B16T2048H8D128",
)
DRY_SHAPES = ("B1T64H2Hk1D64",)

# The rules to time, and the groups of kernels that each runs: see Case.families.
_FAMILIES = {
    "delta_net": ("no decay",),
    "gated_delta_net": ("scalar decay",),
    "kda": ("channel decay",),
    "osdn": ("no decay", "hypergradient"),
    "osdn_trust": ("no decay", "hypergradient"),
    "pgdn": ("scalar decay", "Gram"),
    "pkda": ("channel decay", "Gram"),
}
TIMED_RULES = tuple(_FAMILIES)

FORWARD, BOTH = "forward", "forward + backward"
PROGRAMS = (FORWARD, BOTH)
CONTENDERS = ("ours", "peer", "xla")  # and other implementations, by name

# A repeated stage does not run rows in these states again; it does run those that hung, died, raised or were missing.
FINAL = ("pass", "fail", "absent", "measured", "compiled")
NOT_RUN = "not run"
OUT_OF_TIME = "out of time"
NOT_REACHED = "the stage ended before it"

Row = dict[str, Any]
Emit = Callable[[Row], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """A process: its specification, and the keys of the rows that it owes."""

    spec: Row
    owed: tuple[Row, ...]

    def __str__(self) -> str:
        spec = self.spec
        return " ".join(str(spec[name]) for name in ("kind", "case", "shape", "rule") if name in spec)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The jobs of a stage, and rows for what is not run because of earlier results."""

    jobs: list[Job]
    skipped: list[Row]

    @property
    def owed(self) -> list[Row]:
        return [key for job in self.jobs for key in job.owed]


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of one call of the suite."""

    implementation: str
    dry: bool
    rules: Sequence[str] = TIMED_RULES
    cases: str = "*"  # a pattern
    imports: Sequence[str] = ()  # modules that every process imports first
    also: Sequence[str] = ()  # implementations that are timed in the same rounds

    @property
    def spec(self) -> Row:
        return {"dry": self.dry, "implementation": self.implementation, "imports": list(self.imports)}


def plan_stage(stage: str, known: Sequence[Row], request: Request) -> Plan:
    """Return what a stage still has to do, given the rows that exist.

    Args:
        stage: one of STAGES.
        known: the rows that exist.
        request: the options of this call.
    """
    make = {"smoke": _checks, "check": _checks, "ours": _ours, "peers-compile": _peers_compile, "peers": _peers}
    return make[stage](stage, known, request)


def _checks(section: str, known: Sequence[Row], request: Request) -> Plan:
    jobs, skipped = [], []
    for name, case in cases_of(section, request.dry, request.implementation).items():
        if not fnmatch.fnmatchcase(name, request.cases):
            continue
        owed = _open(({"section": section, "case": name, "keys": keys} for keys in KEYS[: _key_count(section)]), known)
        hung = None if section == "smoke" else _hung(case.families, known, request.dry)
        if hung:
            skipped += missing_rows(owed, (), NOT_RUN, hung)
        elif owed:
            seeds = 1 if request.dry else case.seeds
            spec = {"kind": "check", "section": section, "case": name, "seeds": seeds}
            jobs.append(Job({**request.spec, **spec, "keys": [key["keys"] for key in owed]}, owed))
    return Plan(jobs, skipped)


def _key_count(section: str) -> int:
    return 1 if section == "smoke" else len(KEYS)


def _ours(stage: str, known: Sequence[Row], request: Request) -> Plan:
    jobs, skipped = [], []
    ceilings = _open([{"section": "ceilings"}], known)
    if ceilings:
        jobs.append(Job({**request.spec, "kind": "ceilings"}, ceilings))
    for shape, rule in _races(request):
        owed = _open(_keys("time", shape, rule, ("ours", *request.also, "xla")), known)
        hung = {program: _hung(_FAMILIES[rule], known, request.dry, gradient=program == BOTH) for program in PROGRAMS}
        blocked = [key for key in owed if key["contender"] == "ours" and hung[key["program"]]]
        for key in blocked:
            skipped.append({**key, "status": NOT_RUN, "reason": hung[key["program"]]})
        owed = tuple(key for key in owed if key not in blocked)
        if owed:
            jobs.append(_race(shape, rule, owed, (), request))
    return Plan(jobs, skipped)


def _peers(stage: str, known: Sequence[Row], request: Request) -> Plan:
    """Time the peers, and ours again with them if it is known to run, so that the ratio is of one card and one hour."""
    jobs, skipped = [], []
    for shape, rule in _races(request):
        owed = _open(_keys("time", shape, rule, ("peer",)), known)
        if rule not in PEERS:
            skipped += missing_rows(owed, (), "missing", NO_PEER)
            continue
        slow = [key for key in owed if _status({**_compiled(shape, rule, request), **_program(key)}, known) == "hung"]
        skipped += missing_rows(slow, (), NOT_RUN, "compiling it took too long")
        owed = tuple(key for key in owed if key not in slow)
        if owed:
            beside = [{**key, "contender": "ours"} for key in owed]
            running = [key for key in beside if _status(key, known) == "measured"]
            jobs.append(_race(shape, rule, owed, running, request))
    return Plan(jobs, skipped)


def _peers_compile(stage: str, known: Sequence[Row], request: Request) -> Plan:
    jobs, seen = [], set()
    for shape, rule in _races(request):
        if rule not in PEERS:
            continue
        key = _compiled(shape, rule, request)
        if str(key) in seen:
            continue
        seen.add(str(key))
        owed = _open(({**key, "program": program} for program in PROGRAMS), known)
        if owed:
            programs = [key["program"] for key in owed]
            jobs.append(Job({**request.spec, **key, "kind": "warm", "programs": programs}, owed))
    return Plan(jobs, [])


def _race(shape: str, rule: str, owed: tuple[Row, ...], beside: Sequence[Row], request: Request) -> Job:
    timed, more = ([[key["contender"], key["program"]] for key in keys] for keys in (owed, beside))
    spec = {"kind": "time", "shape": shape, "rule": rule, "timed": timed, "beside": more}
    return Job({**request.spec, **spec}, owed)


def _races(request: Request) -> list[tuple[str, str]]:
    return [(shape, rule) for shape in (DRY_SHAPES if request.dry else SHAPES) for rule in request.rules]


def _keys(section: str, shape: str, rule: str, contenders: Sequence[str]) -> list[Row]:
    key = {"section": section, "shape": shape, "rule": rule}
    return [{**key, "program": p, "contender": c} for p in PROGRAMS for c in contenders]


def _program(key: Row) -> Row:
    return {"program": key["program"]}


def _compiled(shape: str, rule: str, request: Request) -> Row:
    """Return the key of the row of a peer's compilation; its kernels do not depend on batch and length."""

    def heads(text: str) -> tuple[int, ...]:
        s = parse_shapes(text)[0]
        return s.heads, s.key_heads, s.key_dim, s.value_dim

    first = next(s for s in (DRY_SHAPES if request.dry else SHAPES) if heads(s) == heads(shape))
    return {"section": "compile", "shape": first, "rule": rule}


def _open(keys: Iterable[Row], known: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(key for key in keys if _status(key, known) not in FINAL)


def _status(key: Row, known: Sequence[Row]) -> str | None:
    return next((row["status"] for row in known if is_of(row, key)), None)


def _hung(families: Sequence[str], known: Sequence[Row], dry: bool, *, gradient: bool = True) -> str | None:
    """Return why kernels of these groups are not started: one of them hung in the smoke stage; else None."""
    smoke: dict[str, Case] = cases_of("smoke", dry)
    for row in known:
        if row["section"] == "smoke" and row["status"] == "hung":
            case = smoke[row["case"]]
            if case.families[-1] in families and (gradient or not case.gradient):
                return f"{row['case']!r} hung in the smoke stage"
    return None


_ORDER = [*SMOKE, *DRY_SMOKE, *CASES, *DRY_CASES, *TRITON_CASES, *DRY_TRITON_CASES]


def place(row: Row) -> tuple:
    """Return a sort key of rows by importance: sections, then cases or shapes in the order of their lists."""
    section = ("smoke", "check", "ceilings", "time", "compile").index(row["section"])
    if row["section"] in ("smoke", "check"):
        return section, _ORDER.index(row["case"]), KEYS.index(row["keys"])
    if row["section"] == "ceilings":
        return (section,)
    shape, program = [*SHAPES, *DRY_SHAPES].index(row["shape"]), PROGRAMS.index(row["program"])
    return section, shape, TIMED_RULES.index(row["rule"]), program, rank(row.get("contender", "peer"))


def rank(contender: str) -> tuple[float, str]:
    """Return a sort key of contenders: ours, other implementations by name, then the peer and XLA."""
    return (CONTENDERS.index(contender), "") if contender in CONTENDERS else (0.5, contender)


def is_of(row: Row, key: Row) -> bool:
    """Return True if a row has the values of a key."""
    return all(row.get(name) == value for name, value in key.items())


def key_of(row: Row) -> Row:
    """Return the key of a row: the fields that identify it, without its results."""
    names = ("section", "case", "keys", "shape", "rule", "program", "contender")
    return {name: row[name] for name in names if name in row}


def missing_rows(owed: Iterable[Row], rows: Sequence[Row], status: str, reason: str) -> list[Row]:
    """Return rows with a status and reason for the keys that have no row yet."""
    return [{**key, "status": status, "reason": reason} for key in owed if not any(is_of(row, key) for row in rows)]
