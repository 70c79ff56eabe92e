"""Evaluate a trained model:  python -m osdn_jax.evaluate --workdir runs/osdn --tasks my_task --include_path tasks

Runs tasks of lm-evaluation-harness (the extra `eval`) on the newest checkpoint of a run, recall tasks of this package,
a paper's whole list (--suite), and perplexity by position (--positions).
"""

import argparse
import contextlib
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from osdn_jax._files import write_atomically
from osdn_jax.compare.machine import environment
from osdn_jax.console import PipedConsole
from osdn_jax.data import Document, open_stream, read_documents
from osdn_jax.evaluation.flags import parse_flags
from osdn_jax.evaluation.hub import prepare_environment
from osdn_jax.evaluation.position_data import position_windows
from osdn_jax.evaluation.positions import Bucket, perplexity_by_position
from osdn_jax.evaluation.recall_tasks import RecallTask, parse_recall_task, recall_prompts, run_recall_task
from osdn_jax.evaluation.results import Outcome, position_table, record, result_table
from osdn_jax.evaluation.suites import SUITES, Positions, Suite
from osdn_jax.evaluation.text_model import TextModel
from osdn_jax.nn import MixerConfig
from osdn_jax.training import CheckpointError, CheckpointMismatchError
from osdn_jax.training.command_line import fail
from osdn_jax.training.data import build_corpus
from osdn_jax.training.model_config import model_name
from osdn_jax.training.trained import Trained, Unread, open_trained

_PROGRAM = "python -m osdn_jax.evaluate"
_HUB = "hf:"
_WIDTH = 160  # of tables in a file or a pipe
_ERRORS = (ValueError, TypeError, OSError, ImportError, CheckpointError, CheckpointMismatchError)


class _Work(NamedTuple):
    """Tasks to run and texts to measure positions on."""

    tasks: list[str]  # of lm_eval
    recall: list[RecallTask]
    positions: list[tuple[str, Positions]]  # (where the text is; "" for the run's own held-out text, its settings)
    suite: Suite | None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0, or 1 if a task of a suite could not be run because its data or a library is missing.

    Raises:
        SystemExit: the command line is wrong or the run cannot be evaluated (status 2), or help was asked for (0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = parse_flags(_PROGRAM, (__doc__ or "").splitlines()[0], argv)
    out = PipedConsole(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        run = open_trained(command.directory("workdir", given.workdir))
        outcome, trained = _evaluate(given, run)
        outcome.about["environment"] = environment(shlex.join([*_PROGRAM.split(), *argv]))
        if given.output is not None:
            write_atomically(given.output, json.dumps(record(outcome), indent=1) + "\n")
        if given.figure is not None and outcome.positions:
            _plot(given.figure, given.workdir, trained, outcome.positions)
    except _ERRORS as error:
        fail(error)
    _print(out, given, outcome)
    return 1 if outcome.missing else 0


def _evaluate(given: argparse.Namespace, run: Unread) -> tuple[Outcome, Trained]:
    work = _work(given)
    if task := run.config.data.task:
        raise ValueError(f"--workdir: got a run on the recall task {task!r}, expected one on text")
    prepare_environment()
    found: Any = None
    if work.tasks:
        from osdn_jax.evaluation import harness  # needs the extra `eval`

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        found = harness.find_tasks(work.tasks, include_path=given.include_path, allow_code=given.allow_code)
    trained = run.load()
    model = _text_model(given, trained)
    outcome = Outcome([], {}, {}, _about(given, trained, model))
    if found is not None:
        _run_lm_eval(given, work, found, model, outcome)
    for task in work.recall:
        with _unless_missing(work, outcome, task.name), _counting(task.name, "prompts") as progress:
            limit = given.limit or (work.suite.recall_limit if work.suite and not task.completion else None)
            prompts = recall_prompts(task, trained.tokenizer, data=given.data, limit=limit)
            outcome.results.append(run_recall_task(model, task, prompts, progress))
    for place, settings in work.positions:
        with _unless_missing(work, outcome, settings.name), _counting(settings.name, "windows") as progress:
            documents = open_stream(place, split=settings.split) if place else _held_out(trained)
            outcome.positions[settings.name] = _positions(given, trained, documents, settings, progress)
    return outcome, trained


def _run_lm_eval(given: argparse.Namespace, work: _Work, found: Any, model: TextModel, outcome: Outcome) -> None:
    """Run the tasks of lm_eval, and add their results to the outcome."""
    from osdn_jax.evaluation import harness
    from osdn_jax.evaluation.lm_eval_adaptor import LmEvalModel

    tasks, missing = harness.load_tasks(found)
    if missing and work.suite is None:
        raise ValueError("task {}: {}".format(*next(iter(missing.items()))))
    outcome.missing.update(missing)
    options = {"limit": given.limit, "num_fewshot": given.num_fewshot}
    for task in tasks:  # one after another, so that what one fails at does not cost the results of the others
        name = str(getattr(task, "task_name", None) or task.name)
        with _unless_missing(work, outcome, name), _counting(name, "requests") as progress:
            adapted = LmEvalModel(model, about=outcome.about["run"], progress=progress)
            results, about = harness.run_tasks(adapted, [task], found, **options)
            outcome.results.extend(results)
            before = outcome.about.get("lm_eval", {})
            merged = {x: before.get(x, {}) | y if isinstance(y, dict) else y for x, y in about.items()}
            outcome.about["lm_eval"] = before | merged


@contextlib.contextmanager
def _unless_missing(work: _Work, outcome: Outcome, name: str) -> Iterator[None]:
    """In a suite, note a task that cannot be run, such as one without its data, and continue with the next."""
    try:
        yield
    except (OSError, ImportError, ValueError) as error:
        if work.suite is None:
            raise
        outcome.missing[name] = str(error)


def _work(given: argparse.Namespace) -> _Work:
    """Return what the flags ask for."""
    suite = SUITES[given.suite] if given.suite else None
    names = dict.fromkeys([*(suite.tasks + suite.recall if suite else ()), *given.tasks])
    recall = {name: task for name in names if (task := parse_recall_task(name)) is not None}
    positions = [(_local(given, x.name) or f"{_HUB}{x.data}", x) for x in (suite.positions if suite else ())]
    if given.positions is not None:
        length, bucket = given.positions
        name = given.text or "held-out text"
        positions.append((given.text, Positions(name, "", "train", length, bucket, given.limit or sys.maxsize)))
    return _Work([name for name in names if name not in recall], list(recall.values()), positions, suite)


def _local(given: argparse.Namespace, name: str) -> str:
    """Return the path of a data set in the folder of --data, "" if it is not there."""
    if given.data is None:
        return ""
    found = [path for path in (given.data / name, *sorted(given.data.glob(f"{name}.*"))) if path.exists()]
    return str(found[0]) if found else ""


def _held_out(trained: Trained) -> Sequence[Document]:
    data = trained.config.data
    if data.validation_path:
        return read_documents(data.validation_path, field=data.field)
    if data.mixture or data.path.startswith(_HUB):
        raise ValueError("--text: got none, expected the text to measure positions on: the run's data are streamed")
    return build_corpus(trained.config)[1]


def _positions(
    given: argparse.Namespace,
    trained: Trained,
    documents: Any,
    settings: Positions,
    progress: Callable[[int], object],
) -> list[Bucket]:
    limit = settings.windows if given.limit is None else min(settings.windows, given.limit)
    windows = position_windows(
        documents, trained.tokenizer, length=settings.length, batch_size=given.batch_size, limit=limit
    )
    return perplexity_by_position(
        trained.apply,
        trained.parameters,
        windows,
        bucket=settings.bucket,
        ignored=trained.tokenizer.bos_id,
        progress=progress,
    )


def _text_model(given: argparse.Namespace, trained: Trained) -> TextModel:
    attention = any(not isinstance(block.mixer, MixerConfig) for block in trained.model.stack)
    return TextModel(
        trained.apply,
        trained.parameters,
        trained.tokenizer,
        max_length=trained.config.sequence_length if given.max_length is None else given.max_length,
        long=given.long or ("windows" if attention else "carried"),
        start_token=not given.no_start_token,
        batch_size=given.batch_size,
        seed=given.seed,
    )


def _about(given: argparse.Namespace, trained: Trained, model: TextModel) -> dict[str, Any]:
    return {
        "run": {
            "workdir": given.workdir,
            "step": trained.step,
            "rule": model_name(trained.config),
            "parameters": sum(x.size for x in trained.parameters.values()),
            "tokenizer": trained.tokenizer.name,
            "trained_length": trained.config.sequence_length,
        },
        "settings": {
            "long": model.long,
            "max_length": model.max_length,
            "start_token": model.start_token,
            "limit": given.limit,
            "suite": given.suite,
            "seed": given.seed,
        },
    }


def _print(out: Console, given: argparse.Namespace, outcome: Outcome) -> None:
    def line(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    run, settings = outcome.about["run"], outcome.about["settings"]
    reading = "state carried" if settings["long"] == "carried" else f"windows of {settings['max_length']:,} tokens"
    line(f"{run['workdir']}, step {run['step']:,}: {run['rule']}, {run['parameters']:,} parameters; {reading}")
    if outcome.results:
        out.print(result_table(outcome.results), soft_wrap=True)
    for name, buckets in outcome.positions.items():
        line(f"\nPerplexity by position, {name}; trained on {run['trained_length']:,} tokens at a time")
        out.print(position_table(buckets), soft_wrap=True)
    if given.suite:
        suite = SUITES[given.suite]
        line(f"Suite {given.suite}: {suite.paper}; from {suite.source}.")
        for note in suite.notes:
            line(f"- {note}")
    for reason in dict.fromkeys(outcome.missing.values()):
        line(f"not run: {', '.join(x for x, why in outcome.missing.items() if why == reason)}: {reason}")
    for path in (given.output, given.figure if outcome.positions else None):
        if path is not None:
            line(f"Written: {path}")


def _plot(path: Path, workdir: str, trained: Trained, positions: dict[str, list[Bucket]]) -> None:
    from osdn_jax.evaluation.position_plot import plot_positions  # matplotlib takes a second to import

    counts = "; ".join(f"{name}: {buckets[0].windows:,} windows" for name, buckets in positions.items())
    plot_positions(
        {f"{model_name(trained.config)}, {name}": buckets for name, buckets in positions.items()},
        path,
        title=f"Perplexity by position, {workdir}, step {trained.step:,}",
        note=f"{counts}; state carried through each window; bands: one standard error over windows, one run",
        trained=trained.config.sequence_length,
    )


@contextlib.contextmanager
def _counting(what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Show on a terminal's stderr how many units of some work are done; the caller reports them."""
    err = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    done = 0
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def count(number: int) -> None:
            nonlocal done
            done += number
            progress.update(task, description=f"{what}: {done:,} {unit}")

        yield count


if __name__ == "__main__":
    command.run(main)
