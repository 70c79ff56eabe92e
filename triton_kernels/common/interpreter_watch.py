"""Find what a GPU would not survive: accesses outside of the arrays, and races between the programs of a launch.

The interpreter reads and writes raw memory unchecked, and runs one program after the other.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_on = False


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Watch all launches that the interpreter runs inside; about three times as slow."""
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


@contextlib.contextmanager
def watching(name: str, arrays: Sequence[np.ndarray]) -> Iterator[None]:
    """Watch one launch of the kernel of that name on these arrays, if watching is on.

    Raises:
        IndexError: a program touches memory outside of the arrays.
        RuntimeError: two programs touch an element that one of them writes.
    """
    if not _on:
        yield
        return
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    log = _Log(name, arrays)

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        log.note("load", self.grid_idx, pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        log.note("store", self.grid_idx, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
    log.check_races()


class _Log:
    """The addresses that every program loads and stores."""

    def __init__(self, name: str, arrays: Sequence[np.ndarray]) -> None:
        self.name = name
        spans = sorted((x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays)
        self.starts, self.ends = (np.array(side, np.uint64) for side in zip(*spans, strict=True))
        self.touched: list[tuple[np.ndarray, int, bool]] = []  # addresses, number of the program, written
        self.programs: dict[Any, int] = {}

    def note(self, what: str, program: Any, pointers: Any, mask: Any) -> None:
        """Keep the addresses of one access and check that they lie inside the arrays."""
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        found = np.unique(addresses[active]).astype(np.uint64)
        array = np.searchsorted(self.starts, found, side="right") - 1
        outside = (array < 0) | (found >= self.ends[array])
        if outside.any():
            raise IndexError(
                f"{self.name}, program {program}: {what} of {outside.sum()} elements outside of the arrays"
            )
        if len(found) and array.min() != array.max():
            raise IndexError(f"{self.name}, program {program}: one {what} of elements of two arrays")
        number = self.programs.setdefault(tuple(program), len(self.programs))
        self.touched.append((found, number, what == "store"))

    def check_races(self) -> None:
        """Raise RuntimeError if one program writes what another one touches."""
        if not self.touched:
            return
        addresses = np.concatenate([x for x, _, _ in self.touched])
        programs = np.concatenate([np.full(len(x), number) for x, number, _ in self.touched])
        written = np.concatenate([np.full(len(x), store) for x, _, store in self.touched])
        _, element = np.unique(addresses, return_inverse=True)
        first = np.full(element.max() + 1, len(self.programs))
        last, stored = np.full(len(first), -1), np.zeros(len(first), bool)
        np.minimum.at(first, element, programs)
        np.maximum.at(last, element, programs)
        np.logical_or.at(stored, element, written)
        races = stored & (first != last)
        if races.any():
            one = np.flatnonzero(races)[0]
            raise RuntimeError(
                f"{self.name}: {races.sum()} elements are written by one program and touched by another, "
                f"for example programs {first[one]} and {last[one]}"
            )
