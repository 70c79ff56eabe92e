"""The plan of a conversion: the rows of a family matched with the names and shapes of the tensors of a folder.

All differences are found before a tensor is read, and reported together, with equal ones of several layers as one line.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from osdn_jax._errors import printable
from osdn_jax.interop.mapping import Key, Row, Shape, stored_names

_SHOWN = 20  # lines of differences in one error
_NUMBER = r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)"  # of a layer or an expert, between dots


class Source(NamedTuple):
    """The tensors that one row is loaded from.

    Attributes:
        row: the row.
        names: for each key the names in the files, one per expert.
        shapes: for each key the shape in the files, without the axis of experts.
        copies: pairs of (name, name of a copy that must hold the same values).
    """

    row: Row
    names: list[list[str]]
    shapes: list[Shape]
    copies: list[tuple[str, str]]


class Plan(NamedTuple):
    """The tensors of a folder, sorted by what they are for.

    Attributes:
        sources: the tensors of each row.
        left_out: names of tensors that belong to parts that are not loaded, such as vision.
        problems: the differences between what the files have and what the model needs; empty if it can be loaded.
    """

    sources: list[Source]
    left_out: list[str]
    problems: list[str]


def match(
    rows: Sequence[Row],
    parameters: Mapping[str, Shape],
    found: Mapping[str, Shape],
    left_out: Sequence[str] = (),
) -> Plan:
    """Match the rows of a family with the tensors of a folder.

    Args:
        rows: the rows, which have to cover the parameters.
        parameters: {path: shape} of the model's parameters.
        found: {name: shape} of the folder's tensors.
        left_out: regular expressions of the names of tensors that are not loaded.

    Raises:
        ValueError: the rows do not cover the parameters, each once: a fault of the family's table.
    """
    covered = [name for row in rows for name in row.parameters]
    if sorted(covered) != sorted(parameters):
        wrong = sorted(set(covered) ^ set(parameters)) or sorted(name for name in covered if covered.count(name) > 1)
        raise ValueError(f"rows: got a table that misses, repeats or invents the parameters {', '.join(wrong)}")
    missing: list[str] = []
    misshapen: list[tuple[str, str]] = []
    used: set[str] = set()
    sources = []
    for row in rows:
        names = [_names(key, row.experts, found) for key in row.keys]
        shapes = row.shapes(parameters)
        if row.any_widths:
            shapes = _actual_widths(names, shapes, found)
        for group, shape in zip(names, shapes, strict=True):
            missing += [name for name in group if name not in found]
            misshapen += [
                (name, f"got shape {_written(found[name])}, expected {_written(shape)}")
                for name in group
                if name in found and found[name] != shape
            ]
            used.update(group)
        copies = [(names[i][0], name) for i, key in enumerate(row.keys) for name in key.copies if name in found]
        for name, copy in copies:
            used.add(copy)
            if name in found and found[name] != found[copy]:
                misshapen.append((copy, f"got shape {_written(found[copy])}, expected {_written(found[name])}"))
        sources.append(Source(row, names, shapes, copies))
    others = [name for name in found if name not in used]
    ignored = [name for name in others if any(re.match(pattern, name) for pattern in left_out)]
    extra = sorted(set(others) - set(ignored))
    problems = [f"missing: {line}" for line in grouped(missing)]
    problems += [f"extra: {line}" for line in grouped(extra)]
    texts: dict[str, list[str]] = {}
    for name, text in misshapen:
        texts.setdefault(text, []).append(name)
    problems += [f"misshapen: {line}: {text}" for text, names_ in texts.items() for line in grouped(names_)]
    return Plan(sources, ignored, problems)


def summary(problems: Sequence[str], heading: str) -> str:
    """Return one error message of several problems, a line for each."""
    lines = [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  and {len(problems) - _SHOWN} more")
    return "\n".join([f"{heading}:", *lines])


def grouped(names: Iterable[str]) -> list[str]:
    """Return names with the numbers of layers and experts joined, as "model.layers.{0-2,5}.mlp.gate_proj.weight"."""
    # {parts between the numbers: {number of the layer: {the other numbers}}}
    by_parts: dict[tuple[str, ...], dict[tuple[int, ...], set[tuple[int, ...]]]] = {}
    for name in names:
        pieces = re.split(_NUMBER, name)
        numbers = tuple(map(int, pieces[1::2]))
        by_parts.setdefault(tuple(pieces[::2]), {}).setdefault(numbers[:1], set()).add(numbers[1:])
    lines = []
    for parts, layers in by_parts.items():
        alike: dict[frozenset[tuple[int, ...]], list[int]] = {}  # layers in which the same other numbers occur
        for layer, others in layers.items():
            alike.setdefault(frozenset(others), []).extend(layer)
        for others_set, joined in alike.items():
            columns = [sorted(set(column)) for column in zip(*others_set, strict=True)]
            if math.prod(map(len, columns)) == len(others_set):
                places = [[*columns]]
            else:
                places = [[[number] for number in others] for others in sorted(others_set)]
            lines += [_filled(parts, [joined, *place] if joined else place) for place in places]
    return lines


def _filled(parts: Sequence[str], places: Sequence[Sequence[int]]) -> str:
    """Return the parts with the numbers between them."""
    numbers = [*map(_ranges, places), ""]
    return "".join(printable(part) + number for part, number in zip(parts, numbers, strict=True))


def _names(key: Key, experts: int | None, found: Mapping[str, Shape]) -> list[str]:
    """Return the names of a key in the files: those of its alternatives of which a file has one, else its own."""
    for name in (key.name, *key.also):
        names = stored_names(key, experts, name)
        if any(stored in found for stored in names):
            return names
    return stored_names(key, experts)


def _actual_widths(names: list[list[str]], shapes: list[Shape], found: Mapping[str, Shape]) -> list[Shape]:
    """Return the shapes in the files if their outputs have the expected sum, else the expected ones."""
    actual = [found.get(group[0], shape) for group, shape in zip(names, shapes, strict=True)]
    if any(len(got) != len(want) or got[1:] != want[1:] for got, want in zip(actual, shapes, strict=True)):
        return shapes
    return actual if sum(shape[0] for shape in actual) == sum(shape[0] for shape in shapes) else shapes


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as text: 3, or {0-2,5}."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _written(shape: Shape) -> str:
    return str(list(shape))
