"""Plateau and transition of runs, and their statistics over seeds."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

PLATEAU_SHARE = 0.1  # of the steps, at the end
_PLATEAU_EVALUATIONS = 3  # at least


class Row(NamedTuple):
    """The runs of one variant at one learning rate.

    Attributes:
        label: the variant's name.
        learning_rate: the peak of the schedule.
        seeds: of the runs, in ascending order; the lists below have this order.
        plateaus: accuracy at the end of each run, as `plateau`.
        transitions: first evaluated step of each run with at least the threshold's accuracy; None if there is none.
        records: of the runs.
        chosen: True if the learning rate was chosen among several on the first seed.
    """

    label: str
    learning_rate: float
    seeds: list[int]
    plateaus: list[float]
    transitions: list[int | None]
    records: list[dict[str, Any]]
    chosen: bool = False

    @property
    def mean(self) -> float:
        """Mean plateau over seeds."""
        return statistics.fmean(self.plateaus)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the plateau over seeds, with n - 1; None for one seed."""
        return statistics.stdev(self.plateaus) if len(self.plateaus) > 1 else None

    @property
    def past_transition(self) -> float | None:
        """Mean plateau over the seeds that have a transition; None if there are none."""
        values = [value for value, at in zip(self.plateaus, self.transitions, strict=True) if at is not None]
        return statistics.fmean(values) if values else None

    @property
    def reached(self) -> list[int]:
        """The transitions of the runs that have one."""
        return [step for step in self.transitions if step is not None]


def plateau(record: dict[str, Any]) -> float:
    """Return a run's accuracy at its end: the mean over the evaluations in its last tenth, at least over three.

    Example:
        >>> plateau({"steps": [0, 10, 20, 30, 40], "accuracy": [0.0, 0.5, 0.8, 0.9, 1.0]})
        0.9
    """
    steps, accuracy = record["steps"], record["accuracy"]
    count = sum(step > (1 - PLATEAU_SHARE) * steps[-1] for step in steps)
    count = min(max(count, _PLATEAU_EVALUATIONS), max(1, len(steps) - 1))  # without the evaluation before training
    return statistics.fmean(accuracy[-count:])


def transition(record: dict[str, Any], threshold: float) -> int | None:
    """Return the first evaluated step with an accuracy of at least `threshold`; None if there is none.

    Example:
        >>> transition({"steps": [0, 10, 20, 30], "accuracy": [0.0, 0.1, 0.6, 0.4]}, 0.5)
        20
    """
    reached = (step for step, value in zip(record["steps"], record["accuracy"], strict=True) if value >= threshold)
    return next(reached, None)


def default_threshold(records: Sequence[dict[str, Any]], chance: float) -> float:
    """Return the accuracy that counts as the transition: half-way between chance and the best plateau of all runs."""
    return (chance + max([chance, *(plateau(record) for record in records)])) / 2


def summarise(label: str, records: Sequence[dict[str, Any]], threshold: float, *, chosen: bool = False) -> Row:
    """Return the statistics of the runs of one variant at one learning rate, at least one run.

    Args:
        label: the variant's name.
        records: of the runs, in any order.
        threshold: accuracy of the transition.
        chosen: True if the learning rate was chosen among several.
    """
    ordered = sorted(records, key=lambda record: record["seed"])
    return Row(
        label,
        ordered[0]["learning_rate"],
        [record["seed"] for record in ordered],
        [plateau(record) for record in ordered],
        [transition(record, threshold) for record in ordered],
        list(ordered),
        chosen,
    )
