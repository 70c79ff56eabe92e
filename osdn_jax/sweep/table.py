"""The table of a sweep, in Markdown."""

from statistics import median
from typing import NamedTuple

from osdn_jax.sweep.plan import Plan, chosen_rate
from osdn_jax.sweep.results import Record
from osdn_jax.sweep.summary import PLATEAU_SHARE, Row, default_threshold, plateau, summarise
from osdn_jax.training.tasks import configured_tasks


class Summary(NamedTuple):
    """The statistics of a sweep.

    Attributes:
        rows: one for each variant and learning rate with runs; with `choose` only the chosen rates.
        tried: with `choose`, (label, [(learning rate, plateau)] on the first seed) of each variant.
        threshold: accuracy that counts as the transition.
        chance: accuracy of a guess.
        missing: number of runs that have not finished.
    """

    rows: list[Row]
    tried: list[tuple[str, list[tuple[float, float]]]]
    threshold: float
    chance: float
    missing: int


def summarise_plan(plan: Plan, finished: dict[str, Record], threshold: float | None = None) -> Summary:
    """Return the statistics of the runs of a plan.

    Args:
        plan: the sweep.
        finished: the records by key, as `by_key` returns them.
        threshold: accuracy of the transition; default: half-way between chance and the best plateau of all runs.
    """
    runs = [run for run in plan.runs(finished) if run.key in finished]
    chance = max((chance_of(variant.config) for variant in plan.variants), default=0.0)
    if threshold is None:
        threshold = default_threshold([finished[run.key] for run in runs], chance)
    rows, tried = [], []
    for variant in plan.variants:
        own = [run for run in runs if run.variant.label == variant.label]
        first = [finished[run.key] for run in own if run.seed == plan.seeds[0]]
        complete = len(first) == len(plan.learning_rates)
        if plan.choose and first:
            tried.append((variant.label, [(record["learning_rate"], plateau(record)) for record in first]))
        rates = plan.learning_rates if not plan.choose else [chosen_rate(first)] if complete else []
        for rate in rates:
            if records := [finished[run.key] for run in own if run.learning_rate == rate]:
                several = plan.choose and len(plan.learning_rates) > 1
                rows.append(summarise(variant.label, records, threshold, chosen=several))
    return Summary(rows, tried, threshold, chance, plan.total - len(runs))


def chance_of(config: object) -> float:
    """Return the accuracy of a guess: among the values of an example's pairs; of other tasks, in the vocabulary."""
    tasks = configured_tasks(config)
    if tasks is None:
        return 0.0
    return 1 / tasks[1].options.get("pairs", tasks[1].vocabulary)


def markdown(plan: Plan, summary: Summary, command: str) -> str:
    """Return the table of a sweep with its definitions, in Markdown."""
    lines = _head(plan, summary, command)
    lines += [
        "| variant | learning rate | n | plateau, % | sd | min to max | steps to transition | reached | "
        "plateau of those, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_cells(row) for row in summary.rows),
        "",
        *_notes(plan, summary),
    ]
    if summary.tried:
        lines += ["", "Plateau, %, of each learning rate on the first seed:", ""]
        lines += [f"| variant | {' | '.join(f'{rate:g}' for rate in plan.learning_rates)} |"]
        lines += ["| --- |" + " ---: |" * len(plan.learning_rates)]
        for label, pairs in summary.tried:
            values = dict(pairs)
            cells = [f"{100 * values[rate]:.1f}" if rate in values else "" for rate in plan.learning_rates]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _head(plan: Plan, summary: Summary, command: str) -> list[str]:
    lines = [f"    {command}", ""]
    tasks = configured_tasks(plan.variants[0].config)
    config = plan.variants[0].config
    if tasks is not None:
        tested = "" if tasks[0] == tasks[1] else f"; tested on {tasks[1].text}"
        lines.append(f"Task: {tasks[0].text}{tested}; {config.data.validation_examples:,} test examples.")
    model = config.model
    sizes = f"{model.layers} layers of width {model.width}, {model.heads} heads"
    lines.append(f"Model: {sizes}; {config.steps:,} steps of {config.batch_size} examples.")
    records = [record for row in summary.rows for record in row.records]
    if records:
        about = records[0]["environment"]
        steps = sum(record["steps"][-1] * 1.0 for record in records)
        lines.append(
            f"Seeds {', '.join(map(str, plan.seeds))}. On {about['device']} ({about['cpu']}), jax {about['jax']}; "
            f"{1e3 * sum(r['cpu_seconds'] / r['trained_together'] for r in records) / steps:.1f} ms of processor time "
            "per step, with compilation and evaluation."
        )
    if summary.missing:
        lines.append(f"{summary.missing:,} of {plan.total:,} runs have not finished.")
    return [*lines, ""]


def _cells(row: Row) -> str:
    deviation = "–" if row.deviation is None else f"{100 * row.deviation:.1f}"
    reached = sorted(row.reached)
    steps = f"{median(reached):,.0f} ({reached[0]:,} to {reached[-1]:,})" if reached else "–"
    cells = (
        row.label,
        f"{row.learning_rate:g}",
        str(len(row.seeds)),
        f"{100 * row.mean:.1f}",
        deviation,
        f"{100 * min(row.plateaus):.1f} to {100 * max(row.plateaus):.1f}",
        steps,
        f"{len(reached)} of {len(row.seeds)}",
        "–" if row.past_transition is None else f"{100 * row.past_transition:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def _notes(plan: Plan, summary: Summary) -> list[str]:
    notes = [
        f"n: number of seeds. Plateau: mean test accuracy over the evaluations in the last {PLATEAU_SHARE:.0%} of the "
        "steps, at least three; then mean, standard deviation (n − 1), minimum and maximum over seeds.",
        f"Steps to transition: first evaluated step with a test accuracy of at least {100 * summary.threshold:.1f} %; "
        "median (minimum to maximum) over the seeds that reach it; last, the mean plateau of those seeds alone.",
        f"Chance: {100 * summary.chance:.1f} %.",
    ]
    if plan.choose and len(plan.learning_rates) > 1:
        notes.append(
            "The learning rate is the best of the first seed by plateau, of equal ones by mean accuracy over the run; "
            "that seed is one of the n."
        )
        ends = (min(plan.learning_rates), max(plan.learning_rates))
        if at_end := ", ".join(row.label for row in summary.rows if row.learning_rate in ends):
            notes.append(f"The best rate is the lowest or highest tried, so a better one may lie outside: {at_end}.")
    ended = [(row, record["seed"]) for row in summary.rows for record in row.records if record["diverged"]]
    if ended:
        names = ", ".join(f"{row.label} seed {seed} at {row.learning_rate:g}" for row, seed in ended)
        notes.append(f"Diverged, and ended early: {names}.")
    return [line for note in notes for line in (note, "")][:-1]
