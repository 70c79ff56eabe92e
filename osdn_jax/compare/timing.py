"""Timing of several programs in turn, so that a busy machine slows them alike."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass
class Timed:
    """A program to time in turn with others; a subclass says how one measurement is made.

    Args:
        name: its label.
        seconds: seconds per call, one value per round.
        settled: True once `settle` has run.
    """

    name: str
    seconds: list[float] = dataclasses.field(default_factory=list, kw_only=True)
    settled: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def ready(self) -> bool:
        """True if it can run."""
        return True

    @property
    def median_seconds(self) -> float | None:
        """The median over rounds; None if nothing was measured."""
        return float(np.median(self.seconds)) if self.seconds else None

    @property
    def quartile_seconds(self) -> tuple[float, float] | None:
        """The first and third quartile over rounds; None if nothing was measured."""
        return quartiles(self.seconds) if self.seconds else None

    def settle(self) -> None:
        """Warm up, and choose the number of calls per measurement."""

    def measure(self) -> float:
        """Return seconds per call, from one measurement."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method that measures")


def take_turns(contenders: Sequence[Timed], repeats: int, alive: Callable[[], None] = lambda: None) -> None:
    """Measure A B C A B C ...: whatever slows the machine for a while slows all of them alike.

    Args:
        contenders: the programs; those that are not ready are left out, the others' `seconds` grow.
        repeats: number of rounds; in each, every program is measured once.
        alive: called before each round.
    """
    ready = [c for c in contenders if c.ready]
    for c in ready:
        if not c.settled:
            c.settle()
            c.settled = True
    for _ in range(repeats):
        alive()
        for c in ready:
            c.seconds.append(c.measure())


def quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile."""
    low, high = np.quantile(seconds, [0.25, 0.75])
    return float(low), float(high)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over rounds of the ratio of two programs' times within a round.

    Args:
        numerators: seconds per round of one program.
        denominators: seconds per round of the other.

    Example:
        >>> ratio([1.0, 10.0, 2.0], [0.5, 5.0, 1.0])
        2.0
    """
    return float(np.median(np.asarray(numerators) / np.asarray(denominators)))
