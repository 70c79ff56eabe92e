"""The runs of a sweep: which are needed, given those that have finished."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from osdn_jax.sweep.results import Record
from osdn_jax.sweep.summary import plateau
from osdn_jax.sweep.variants import Variant, settings_of


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of a variant.

    Attributes:
        variant: what is trained.
        seed: of the initial parameters, the examples and dropout.
        learning_rate: the peak of the schedule.
        key: hexadecimal digits that stand for settings, seed and learning rate.
    """

    variant: Variant
    seed: int
    learning_rate: float
    key: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep.

    Attributes:
        variants: the configurations.
        seeds: of the runs.
        learning_rates: without `choose` every seed is trained at each.
        choose: train the first seed at each learning rate, and the other seeds only at the best one (`chosen_rate`).
        vmap: train all seeds of a variant and learning rate at once.

    Example:
        >>> from osdn_jax.sweep import Plan, make_variants
        >>> from osdn_jax.training import default_config
        >>> plan = Plan(make_variants(default_config(), ["osdn", "pdn"]), seeds=[0, 1], learning_rates=[1e-3, 3e-3])
        >>> len(plan.runs({})), plan.total
        (8, 8)
    """

    variants: Sequence[Variant]
    seeds: Sequence[int]
    learning_rates: Sequence[float]
    choose: bool = False
    vmap: bool = False

    @property
    def total(self) -> int:
        """The number of runs when the sweep is complete."""
        rates, seeds = len(self.learning_rates), len(self.seeds)
        return len(self.variants) * (rates + seeds - 1 if self.choose else rates * seeds)

    def runs(self, finished: Mapping[str, Record]) -> list[Run]:
        """Return the runs that the sweep needs, in order, including those that have finished.

        With `choose`, the runs at a variant's best learning rate are known when it has been tried at every rate.

        Args:
            finished: the records of runs by key.
        """
        return [run for variant in self.variants for run in self._of(variant, finished)]

    def _of(self, variant: Variant, finished: Mapping[str, Record]) -> list[Run]:
        digest = digest_of(variant.settings)

        def at(seed: int, rate: float) -> Run:
            return Run(variant, seed, rate, digest_of([digest, seed, rate]))

        if not self.choose:
            return [at(seed, rate) for rate in self.learning_rates for seed in self.seeds]
        tried = [at(self.seeds[0], rate) for rate in self.learning_rates]
        if not all(run.key in finished for run in tried):
            return tried
        best = chosen_rate([finished[run.key] for run in tried])
        return tried + [at(seed, best) for seed in self.seeds[1:]]

    def as_json(self) -> str:
        """Return the plan as text; `Plan.from_json` reads it."""
        variants = [{"label": v.label, "config": v.config.to_dict()} for v in self.variants]
        return json.dumps(dataclasses.asdict(dataclasses.replace(self, variants=())) | {"variants": variants})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan of `as_json`."""
        fields: dict[str, Any] = json.loads(text)
        fields["variants"] = [Variant(v["label"], ConfigDict(v["config"])) for v in fields["variants"]]
        return cls(**fields)


def chosen_rate(records: Sequence[Record]) -> float:
    """Return the learning rate of the best run: the highest plateau, of equal ones the highest mean over the curve."""
    best = max(records, key=lambda record: (plateau(record), sum(record["accuracy"]) / len(record["accuracy"])))
    return float(best["learning_rate"])


def by_key(records: Sequence[Record]) -> dict[str, Record]:
    """Return {key: record} of a results file, the first of several of one run.

    The key is that of the settings in the record, so that a run is found again after the configuration has got new keys
    whose defaults leave everything as it was.
    """
    found: dict[str, Record] = {}
    for record in records:
        digest = digest_of(settings_of(record["settings"]))
        found.setdefault(digest_of([digest, record["seed"], record["learning_rate"]]), record)
    return found


def digest_of(value: Any) -> str:
    """Return 16 hexadecimal digits that stand for what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
