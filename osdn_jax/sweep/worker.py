"""A process of a sweep: it trains one run after another until none is left.

The parent writes the plan to its standard input and reads messages from its standard output, a JSON object per line:
{"finished": [keys]}, and {"share": x}, the share of the current runs that is done, in runs.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from osdn_jax.compare.machine import environment
from osdn_jax.nn import parameter_formula
from osdn_jax.sweep.claims import Claims
from osdn_jax.sweep.plan import Plan, Run, by_key, digest_of
from osdn_jax.sweep.results import RESULTS_FILE, append_result, read_results
from osdn_jax.sweep.trainer import Trainer
from osdn_jax.sweep.variants import Variant
from osdn_jax.training import build_model_config

_WAIT = 1.0  # seconds between looks at the results, while other processes have the rest of the runs


class Worker:
    """Trains the runs of a plan that no other process has claimed.

    Args:
        plan: the sweep.
        folder: with the results file.
        tell: called with each message for the parent.
        about: the command, machine and versions, for the records.
    """

    def __init__(
        self, plan: Plan, folder: Path, tell: Callable[[dict[str, Any]], object], about: dict[str, Any]
    ) -> None:
        """Prepare; nothing is compiled yet."""
        self._plan, self._folder, self._tell, self._about = plan, folder, tell, about
        self._told: set[str] = set()
        self._variant: Variant | None = None
        self._trainer: tuple[Any, Trainer] | None = None  # with what it was made for

    def run(self) -> None:
        """Train until every run of the plan has finished, here or in another process."""
        with Claims(self._folder) as claims:
            while missing := self._missing():
                if not self._advance(missing, claims):
                    time.sleep(_WAIT)

    def _missing(self) -> list[Run]:
        """Return the runs that have not finished, and tell the parent which have."""
        finished = by_key(read_results(self._folder).records)
        runs = self._plan.runs(finished)
        news = [run.key for run in runs if run.key in finished and run.key not in self._told]
        if news:
            self._told.update(news)
            self._tell({"finished": news})
        return [run for run in runs if run.key not in finished]

    def _advance(self, missing: Sequence[Run], claims: Claims) -> bool:
        """Train one run, or with vmap those of a variant and learning rate; False if others have claimed all."""
        for variant in self._in_order(list({run.variant.label: run.variant for run in missing}.values()), claims):
            for group in self._groups([run for run in missing if run.variant is variant]):
                taken = [run for run in group if claims.take(run.key)]
                still = {run.key for run in self._missing()}  # another process may have finished it in between
                wanted = [run for run in taken if run.key in still]
                try:
                    if wanted:
                        self._enter(variant, claims)
                        self._train(wanted)
                        return True
                finally:
                    for run in taken:
                        claims.release(run.key)
        return False

    def _in_order(self, variants: Sequence[Variant], claims: Claims) -> Iterator[Variant]:
        """Yield the variant whose program is compiled here; then those that no other process works on; then all."""
        yield from (variant for variant in variants if variant is self._variant)
        for variant in variants:
            if variant is not self._variant and claims.take(digest_of(variant.settings)):
                yield variant
                claims.release(digest_of(variant.settings))  # not reached if a run of it was trained
        yield from variants

    def _groups(self, runs: Sequence[Run]) -> list[list[Run]]:
        if not self._plan.vmap:
            return [[run] for run in runs]
        rates = dict.fromkeys(run.learning_rate for run in runs)
        return [[run for run in runs if run.learning_rate == rate] for rate in rates]

    def _enter(self, variant: Variant, claims: Claims) -> None:
        """Give up the claim on the variant before."""
        if self._variant is not None and variant is not self._variant:
            claims.release(digest_of(self._variant.settings))
        self._variant = variant

    def _train(self, runs: Sequence[Run]) -> None:
        variant, rate, seeds = runs[0].variant, runs[0].learning_rate, [run.seed for run in runs]
        members = len(runs) if self._plan.vmap else None
        made_for = (variant.label, members)
        if self._trainer is None or self._trainer[0] != made_for:
            self._trainer = None  # its memory is free before the next one is compiled
            self._trainer = (made_for, Trainer(variant.config, members))
        done = 0

        def on_steps(steps: int) -> None:
            nonlocal done
            done += steps
            self._tell({"share": len(runs) * done / variant.config.steps})

        cpu, wall = time.process_time(), time.perf_counter()
        curves = self._trainer[1].train(seeds, rate, on_steps)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        common = {
            "label": variant.label,
            "learning_rate": rate,
            "parameters": parameter_formula(build_model_config(variant.config)),
            "seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "trained_together": len(runs),
            "environment": self._about,
            "settings": variant.settings,
        }
        for run, curve in zip(runs, curves, strict=True):
            record = {"key": run.key, "seed": run.seed} | curve._asdict() | common
            append_result(self._folder / RESULTS_FILE, record)
        self._missing()


def main() -> None:
    """Read {"plan", "folder", "command"} from standard input and train."""
    given = json.loads(sys.stdin.read())
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no message

    def tell(message: dict[str, Any]) -> None:
        try:
            print(json.dumps(message), file=messages, flush=True)
        except BrokenPipeError:  # the parent has ended
            os._exit(command.READER_LEFT)

    about = environment(given["command"])
    Worker(Plan.from_json(given["plan"]), Path(given["folder"]), tell, about).run()


if __name__ == "__main__":
    command.run(main)
