"""Every rule on every condition: `run_bench`, and the results of it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from osdn_jax.regression.builtin import RULES
from osdn_jax.regression.conditions import Condition, standard_conditions
from osdn_jax.regression.measure import Scores, check_causal, measure_rule
from osdn_jax.regression.rules import Rule, as_rule
from osdn_jax.regression.sequences import draw

BETAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4)
SEEDS = 8
BASELINE = "delta_net"  # the losses of every rule are also given relative to its


class Value(NamedTuple):
    """A mean over seeds and its standard error; of a geometric mean, the error is a factor."""

    mean: float
    error: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One rule on one condition.

    Attributes:
        condition: the condition.
        rule: the rule's name.
        betas: the values of beta.
        scores: loss, end, ratio and recall, each [betas, seeds]; see `Scores`.
    """

    condition: Condition
    rule: str
    betas: tuple[float, ...]
    scores: Scores

    @property
    def lowest_end(self) -> int:
        """The index of the beta with the lowest loss at the end."""
        return int(np.argmin(np.log(np.maximum(self.scores.end, np.finfo(float).tiny)).mean(1)))

    @property
    def best(self) -> int:
        """The index of the best beta: of the lowest mean loss; with pairs, of the highest recall, then lowest end."""
        if self.condition.pairs:
            return int(np.lexsort((self.scores.end.mean(1), -self.scores.recall.mean(1)))[0])
        return int(np.argmin(self.scores.loss.mean(1)))

    def at(self, beta: float) -> int:
        """Return the index of a value of beta.

        Raises:
            ValueError: it was not measured.
        """
        if beta not in self.betas:
            raise ValueError(f"beta: got {beta}, expected one of {', '.join(f'{b:g}' for b in self.betas)}")
        return self.betas.index(beta)

    def value(self, name: str, index: int) -> Value:
        """Return a score's mean over seeds at an index of beta: geometric for "end" and "ratio"."""
        values = getattr(self.scores, name)[index]
        return geometric(values) if name in ("end", "ratio") else arithmetic(values)


def arithmetic(values: np.ndarray) -> Value:
    """Return the mean and its standard error; infinite if a value is."""
    if not np.all(np.isfinite(values)):
        return Value(math.inf, math.nan)
    return Value(float(values.mean()), _standard_error(values))


def geometric(values: np.ndarray) -> Value:
    """Return the geometric mean and the factor of its standard error; infinite if a value is."""
    if not np.all(np.isfinite(values)):
        return Value(math.inf, math.nan)
    logs = np.log(np.maximum(values, np.finfo(float).tiny))
    return Value(float(np.exp(logs.mean())), float(np.exp(_standard_error(logs))))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else math.nan


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of `run_bench`.

    Attributes:
        rows: one for each condition and rule, in the order of measurement.
        rules: the rules that were measured, by name.
        seeds: number of sequences in each condition.
    """

    rows: list[Row]
    rules: dict[str, Rule]
    seeds: int

    def row(self, rule: str, condition: Condition) -> Row:
        """Return the row of a rule on a condition.

        Raises:
            KeyError: it was not measured.
        """
        for row in self.rows:
            if row.rule == rule and row.condition == condition:
                return row
        raise KeyError(f"{rule} was not measured on {condition.family}: {condition.name}")

    def conditions(self, family: str | None = None) -> list[Condition]:
        """Return the conditions that were measured, all or those of a family."""
        found = dict.fromkeys(row.condition for row in self.rows)
        return [condition for condition in found if family in (None, condition.family)]

    def relative(self, row: Row, *, beta: float | None = None, score: str = "loss") -> Value:
        """Return a score divided by DeltaNet's on the same sequences: geometric mean and factor of its error.

        Args:
            row: the row.
            beta: the value of beta of both; default None, each at its best.
            score: "loss" or "end".

        Returns:
            Not-a-number if DeltaNet was not measured or diverges.
        """
        try:
            base = self.row(BASELINE, row.condition)
        except KeyError:
            return Value(math.nan, math.nan)
        indices = [r.best if beta is None else r.at(beta) for r in (row, base)]
        mine, its = (getattr(r.scores, score)[i] for r, i in zip((row, base), indices, strict=True))
        if not np.all(np.isfinite(its)):
            return Value(math.nan, math.nan)
        return geometric(mine / its)


def run_bench(
    rules: Mapping[str, Rule | Callable[..., Any]] | None = None,
    *,
    builtin: Iterable[str] | None = None,
    families: Iterable[str] | None = None,
    conditions: Sequence[Condition] | None = None,
    seeds: int = SEEDS,
    betas: Sequence[float] = BETAS,
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Results:
    """Measure rules of memory on streams of keys and values, without training.

    Every rule sees the same sequences, in float64, with one constant beta at a time. The whole bench takes about six
    minutes of one CPU core; one rule of yours with `builtin=["delta_net"]` takes less than one.

    Args:
        rules: your rules by name: a function of (k, beta) that returns write keys, a function of (q, k, v, beta) that
            returns outputs (not scaled) or a tuple that begins with them, or a `Rule`. Arrays are [B, T, 1, K], beta is
            [B, T, 1]. `jax.jit` must be able to trace the function.
        builtin: names of the built-in rules to measure, too; default all of them.
        families: names of the families of conditions; default all.
        conditions: your own conditions instead of families.
        seeds: number of sequences in each condition, each with its own map, default 8.
        betas: the values of beta; default 13 values from 0.05 to 1.4. 1 must be among them.
        quick: a few small conditions, to try a rule in seconds; they are no results.
        progress: called before each row with its number from 0, the number of rows, and a text.

    Returns:
        The results: `results.row(rule, condition)` has the scores of every seed, `markdown(results)` makes
        tables of them.

    Raises:
        ValueError: a name is unknown or used twice, betas lack 1, or a rule returns another shape or looks ahead.
        TypeError: a rule is of none of the three forms.

    Example:
        >>> import jax.numpy as jnp
        >>> from osdn_jax.regression import Condition, run_bench
        >>> def normalised(k, beta):  # the step <w, k> is 1 whatever the norm of k is
        ...     return k / jnp.sum(k * k, axis=-1, keepdims=True)
        >>> condition = Condition("mine", scale=(0.1, 4.0), path="ramp", length=200)
        >>> results = run_bench({"mine": normalised}, builtin=["delta_net"], conditions=[condition], betas=(0.5, 1.0))
        >>> mine, delta_net = (results.row(name, condition) for name in ("mine", "delta_net"))
        >>> bool(mine.scores.loss.mean(1).min() < 0.5 * delta_net.scores.loss.mean(1).min())
        True
    """
    chosen = _chosen(rules, builtin)
    betas = _betas(betas)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds: got {seeds!r}, expected an integer of at least 1")
    if conditions is not None and families is not None:
        raise ValueError("conditions: got conditions and families, expected one of them")
    asked = list(conditions) if conditions is not None else standard_conditions(families, quick=quick)
    todo = [(c, [name for name, r in chosen.items() if c.family in (r.families or (c.family,))]) for c in asked]
    total = sum(len(names) for _, names in todo)
    rows: list[Row] = []
    unchecked = set(rules or ())
    for condition, names in todo:
        sequences = draw(condition, seeds)
        for name in names:
            if progress is not None:
                progress(len(rows), total, f"{condition.family}, {condition.name}: {name}")
            try:
                if name in unchecked:
                    unchecked.remove(name)
                    check_causal(chosen[name], sequences)
                rows.append(Row(condition, name, betas, measure_rule(chosen[name], sequences, betas)))
            except ValueError as error:
                raise ValueError(f"rules: {name}: {error}") from error
    return Results(rows, chosen, seeds)


def _chosen(rules: Mapping[str, Rule | Callable[..., Any]] | None, builtin: Iterable[str] | None) -> dict[str, Rule]:
    names = list(RULES) if builtin is None else list(builtin)
    for name in names:
        if name not in RULES:
            raise ValueError(f"builtin: got {name!r}, expected some of {', '.join(RULES)}")
    yours = {name: as_rule(name, rule) for name, rule in (rules or {}).items()}
    twice = sorted(yours.keys() & RULES.keys())
    if twice:
        raise ValueError(f"rules: got {twice[0]!r}, the name of a built-in rule; expected another name")
    if not yours and not names:
        raise ValueError("rules: got no rule, expected at least one")
    return {**{name: RULES[name] for name in names}, **yours}


def _betas(betas: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(beta) for beta in betas)
    if 1.0 not in values or not all(0 < beta < math.inf for beta in values):
        raise ValueError(f"betas: got {betas!r}, expected numbers above 0 with 1 among them")
    return values
