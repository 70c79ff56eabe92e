"""Collectives of a compiled program, parsed from its HLO text."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations|called_computations|true_computation|false_computation)"
    r"=(\{[^{}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_SIZES = {"pred": 1, "c64": 8, "c128": 16}
_GROUPS = re.compile(
    r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\}(?=,|$))"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Identical collectives of one program, grouped.

    Args:
        kind: such as "all-gather".
        groups: positions in the mesh of the devices of each group, or the pairs of a permutation.
        size: bytes of the whole array that is gathered, reduced or exchanged, on one device.
        count: number of executions in one run of the program.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    size: int
    count: int

    @property
    def members(self) -> int:
        """Number of devices in a group."""
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one run of the program, with ring algorithms."""
        n = self.members
        factor = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.count * self.size * factor

    def per_host(self, hosts: Sequence[int]) -> int | None:
        """Return the number of members on one host of the groups that span hosts; None if no group does.

        It is the maximum over the hosts of a group, and the minimum of these over groups.

        Args:
            hosts: the host of each position in the mesh.
        """
        across = [group for group in self.groups if len({hosts[i] for i in group}) > 1]
        counts = [list(map([hosts[i] for i in group].count, {hosts[i] for i in group})) for group in across]
        return min(map(max, counts)) if counts else None


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The collectives of a program.

    Args:
        collectives: one for each kind, group and size.
        uncounted_loops: number of loops with collectives whose length the compiler does not know; they count once.
    """

    collectives: tuple[Collective, ...]
    uncounted_loops: int


def parse(text: str, devices: int) -> Collectives:
    """Parse the collectives of a compiled program.

    Those in loops count as often as the loop runs, and all branches of a conditional count. Groups of a single device
    are left out.

    Args:
        text: the program, `Compiled.as_text()`.
        devices: the number of devices that it runs on.

    Raises:
        ValueError: the text has a notation that is not known.
    """
    direct: dict[str, list[tuple[str, tuple[tuple[int, ...], ...], int]]] = {}
    calls: dict[str, list[tuple[str, int | None]]] = {}
    entry, current = None, ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if found := _COMPUTATION.match(line):
                current = found[2]
                direct[current], calls[current] = [], []
                entry = current if found[1] else entry
            continue
        if " custom-call(" in line or not (found := _INSTRUCTION.match(line)):
            continue  # the line of a kernel contains its code
        result, operation, rest = found.groups()
        kind = operation.removesuffix("-start")
        if kind in _KINDS:
            groups = _groups(rest, devices)
            if max(map(len, groups), default=1) > 1:
                direct[current].append((kind, groups, _size(kind, result, operation != kind, max(map(len, groups)))))
            continue
        trips: int | None = 1
        if operation == "while":
            known = _TRIPS.search(rest)
            trips = int(known[1]) if known else None
        if "=" in rest:
            for _, names in _CALLED.findall(rest):
                calls[current] += [(name, trips) for name in re.findall(r"[\w.\-]+", names)]
    if entry is None:
        raise ValueError("text: got no program of the compiler, expected one with an ENTRY")
    return _count(entry, direct, calls)


def _count(entry: str, direct: dict[str, list], calls: dict[str, list[tuple[str, int | None]]]) -> Collectives:
    totals: dict[tuple, int] = {}
    holds: dict[str, bool] = {}  # computation: True if it, or one that it calls, has a collective
    uncounted = 0

    def has(name: str) -> bool:
        if name not in holds:
            holds[name] = bool(direct.get(name)) or any(has(inner) for inner, _ in calls.get(name, []))
        return holds[name]

    def count(name: str, times: int) -> None:
        nonlocal uncounted
        for key in direct[name]:
            totals[key] = totals.get(key, 0) + times
        for inner, trips in calls[name]:
            if inner in direct and has(inner):
                uncounted += trips is None
                count(inner, times * (1 if trips is None else trips))

    count(entry, 1)
    found = [Collective(kind, groups, size, count) for (kind, groups, size), count in totals.items()]
    return Collectives(tuple(sorted(found, key=lambda x: -x.sent)), uncounted)


def _size(kind: str, result: str, started: bool, members: int) -> int:
    arrays = [_bytes(*array) for array in _ARRAY.findall(result)]
    if started:
        if kind == "collective-permute":
            arrays = arrays[1:2]  # (operand, result, ...)
        elif result.startswith("(("):
            arrays = arrays[len(arrays) // 2 :]  # ((operands), results)
        elif kind == "all-gather":
            arrays = arrays[1:]  # (operand, result)
    return sum(arrays) * (members if kind == "reduce-scatter" else 1)


def _bytes(name: str, shape: str) -> int:
    if name not in _SIZES:
        width = re.match(r"(?:bf|f|s|u)(\d+)", name)
        if width is None:
            raise ValueError(f"text: got an array of type {name!r}, expected one with a width in bits")
        _SIZES[name] = max(1, int(width[1]) // 8)
    return _SIZES[name] * int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    if pairs := _PAIRS.search(attributes):
        found = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
        return tuple(pair for pair in found if pair[0] != pair[1]) or ((0,),)
    match = _GROUPS.search(attributes)
    text = match[1] if match else "{}"
    if text == "{}":
        return (tuple(range(devices)),)
    if text.startswith("{"):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))
    if text.startswith("["):
        shape, source, *order = (_ints(numbers) for numbers in re.findall(r"[\d,]+", text))
        ids = np.arange(devices).reshape(source)
        return _tuples((ids.transpose(order[0]) if order else ids).reshape(shape))
    return _of_axes(text, devices)


def _of_axes(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Parse mesh['data'=2,'fsdp'=4] {'fsdp'}: groups along axes, or along sub-axes such as 'fsdp':(1)2."""
    match = re.fullmatch(r"mesh\[((?:'[^']*'=\d+,?)+)\](?:, device_ids=\(([\d,\s]+)\))? \{(.*)\}", text)
    if match is None:
        raise ValueError(f"replica_groups: got {text!r}, which is no notation that is known")
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", match[1])]
    chosen = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", match[3])
    shape, group = [], []
    for name, size in axes:
        factors = sorted((int(before), int(factor)) for other, before, factor in chosen if other == name and factor)
        if any(other == name and not factor for other, _, factor in chosen):
            factors = [(1, size)]
        done = 1
        for before, factor in factors:
            shape += [before // done, factor]
            group.append(len(shape) - 1)
            done = before * factor
        shape.append(size // done)
    ids = np.arange(devices) if match[2] is None else np.array(_ints(match[2]))
    rest = [i for i in range(len(shape)) if i not in group]
    return _tuples(ids.reshape(shape).transpose(rest + group).reshape(-1, int(np.prod([shape[i] for i in group]))))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _tuples(groups: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in group) for group in groups)
