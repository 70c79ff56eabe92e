"""Evaluate a trained model:  python -m osdn_jax.evaluate --workdir runs/osdn --tasks my_task --include_path tasks

Runs tasks of lm-evaluation-harness (the extra `eval`) on the newest checkpoint of a run, recall tasks of this package,
a paper's whole list (--suite), and perplexity by position (--positions).
"""

import argparse
import contextlib
import json
import logging
import math
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
from osdn_jax.evaluation.position_data import position_windows
from osdn_jax.evaluation.positions import Bucket, perplexity_by_position
from osdn_jax.evaluation.results import Result, position_table, result_table
from osdn_jax.evaluation.suites import SUITES, Positions, Suite
from osdn_jax.evaluation.text_model import LONG, TextModel
from osdn_jax.nn import AttentionConfig
from osdn_jax.training import CheckpointError, CheckpointMismatchError
from osdn_jax.training.command_line import fail
from osdn_jax.training.data import build_corpus
from osdn_jax.training.trained import Trained, Unread, open_trained

_PROGRAM = "python -m osdn_jax.evaluate"
_HUB = "hf:"
_WIDTH = 160  # of tables in a file or a pipe
_ERRORS = (ValueError, TypeError, OSError, ImportError, CheckpointError, CheckpointMismatchError)


class Outcome(NamedTuple):
    """Results of an evaluation.

    Attributes:
        results: the values of the tasks' metrics.
        positions: {text: perplexity by position}.
        missing: {task: why it was not run}.
        about: versions and settings, as JSON can hold them.
    """

    results: list[Result]
    positions: dict[str, list[Bucket]]
    missing: dict[str, str]
    about: dict[str, Any]


class _Work(NamedTuple):
    """Tasks to run and texts to measure positions on."""

    tasks: list[str]  # of lm_eval
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
    given = _parse(argv)
    out = PipedConsole(width=None if sys.stdout.isatty() else _WIDTH)
    try:
        run = open_trained(command.directory("workdir", given.workdir))
        outcome, trained = _evaluate(given, run)
        about = {"environment": environment(shlex.join([*_PROGRAM.split(), *argv])), **outcome.about}
        if given.output is not None:
            write_atomically(given.output, json.dumps(_record(outcome, about), indent=1) + "\n")
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
    found: Any = None
    if work.tasks:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        from osdn_jax.evaluation import harness  # needs the extra `eval`

        harness.prepare_environment()
        found = harness.find_tasks(work.tasks, include_path=given.include_path, allow_code=given.allow_code)
    trained = run.load()
    results: list[Result] = []
    missing: dict[str, str] = {}
    about: dict[str, Any] = _about(given, trained)
    positions: dict[str, list[Bucket]] = {}
    model = _text_model(given, trained)
    if found is not None:
        tasks, missing = harness.load_tasks(found)
        if missing and work.suite is None:
            raise ValueError(next(iter(missing.values())))
        if tasks:
            from osdn_jax.evaluation.lm_eval_adaptor import LmEvalModel

            with _counting(", ".join(work.tasks), "requests") as progress:
                adapted = LmEvalModel(model, about=about["run"], progress=progress)
                results, about["lm_eval"] = harness.run_tasks(
                    adapted, tasks, found, limit=given.limit, num_fewshot=given.num_fewshot
                )
    missing |= {name: f"{name}: no such recall task yet" for name in (work.suite.recall if work.suite else ())}
    for place, settings in work.positions:
        try:
            documents = list(_held_out(trained)) if not place else open_stream(place, split=settings.split)
            with _counting(f"positions of {settings.name}", "windows") as progress:
                positions[settings.name] = _positions(given, trained, documents, settings, progress)
        except (FileNotFoundError, ConnectionError) as error:
            if work.suite is None:
                raise
            missing[settings.name] = f"{settings.name}: {_how_to_get(settings.name, settings.data)} ({error})"
    return Outcome(results, positions, missing, about), trained


def _work(given: argparse.Namespace) -> _Work:
    """Return what the flags ask for."""
    suite = SUITES[given.suite] if given.suite else None
    tasks = list(dict.fromkeys([*(suite.tasks if suite else ()), *given.tasks]))
    positions = [(_local(given, x.name) or f"{_HUB}{x.data}", x) for x in (suite.positions if suite else ())]
    if given.positions is not None:
        length, bucket = given.positions
        name = given.text or "held-out text"
        positions.append((given.text, Positions(name, "", "train", length, bucket, given.limit or sys.maxsize)))
    return _Work(tasks, positions, suite)


def _local(given: argparse.Namespace, name: str) -> str:
    """Return the path of a data set in the folder of --data, "" if it is not there."""
    if given.data is None:
        return ""
    found = [path for path in (given.data / name, *sorted(given.data.glob(f"{name}.*"))) if path.exists()]
    return str(found[0]) if found else ""


def _how_to_get(name: str, data: str) -> str:
    return (
        f"its data set {data} is neither in --data (as {name}.jsonl, {name}.txt or a folder {name}) nor to be had from "
        "the Hugging Face hub"
    )


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
    attention = isinstance(trained.model.mixer, AttentionConfig)
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


def _about(given: argparse.Namespace, trained: Trained) -> dict[str, Any]:
    model = _text_model(given, trained)
    return {
        "run": {
            "workdir": given.workdir,
            "step": trained.step,
            "rule": trained.config.model.rule,
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


def _record(outcome: Outcome, about: dict[str, Any]) -> dict[str, Any]:
    """Return what the file of --output holds."""
    return _without_nan(
        {
            **about,
            "results": [result._asdict() for result in outcome.results],
            "positions": {
                name: [{**bucket._asdict(), "perplexity": bucket.perplexity} for bucket in buckets]
                for name, buckets in outcome.positions.items()
            },
            "missing": outcome.missing,
        }
    )


def _without_nan(value: Any) -> Any:
    """Return a value with null for the numbers that JSON does not have, and text for what it cannot hold."""
    if isinstance(value, dict):
        return {str(name): _without_nan(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


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
    for reason in outcome.missing.values():
        line(f"not run: {reason}")
    for path in (given.output, given.figure if outcome.positions else None):
        if path is not None:
            line(f"Written: {path}")


def _plot(path: Path, workdir: str, trained: Trained, positions: dict[str, list[Bucket]]) -> None:
    from osdn_jax.evaluation.position_plot import plot_positions  # matplotlib takes a second to import

    counts = "; ".join(f"{name}: {buckets[0].windows:,} windows" for name, buckets in positions.items())
    plot_positions(
        {f"{trained.config.model.rule}, {name}": buckets for name, buckets in positions.items()},
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


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected names separated by commas")
    return names


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {least}")
        return int(text)

    return integer


def _length_and_bucket(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected LENGTH,BUCKET in tokens, such as 20480,2048")
    length, bucket = map(int, parts)
    if bucket > length:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a bucket of at most the length")
    return length, bucket


def _file(flag: str, suffix: str) -> Callable[[str], Path]:
    def file(text: str) -> Path:
        if Path(text).suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a file that ends in {suffix}")
        try:
            return command.output_file(flag, text, replaced=True)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--{flag}: ")) from error

    return file


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.Parser(prog=_PROGRAM, description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", required=True, help="working directory of a run of train.py")
    add("--tasks", type=_names, default=[], metavar="NAME,NAME", help="tasks, groups, tags or task files (YAML)")
    add("--include_path", action="append", default=[], metavar="DIR", help="folder of task files; may be repeated")
    add("--suite", choices=sorted(SUITES), help="the tasks of a paper")
    add("--data", type=Path, metavar="DIR", help="folder of data sets that a suite would else fetch from the hub")
    add("--positions", type=_length_and_bucket, metavar="LENGTH,BUCKET", help="perplexity by position, in tokens")
    add("--text", default="", metavar="PATH", help="text of --positions (default: the run's held-out text)")
    add("--limit", type=_integer(1), metavar="N", help="documents of a task, and windows of --positions, at most")
    add("--num_fewshot", type=_integer(0), metavar="N", help="examples before each question (default: the task's)")
    add("--output", type=_file("output", ".json"), metavar="FILE.json", help="write the results to this file")
    add("--figure", type=_file("figure", ".png"), metavar="FILE.png", help="plot perplexity by position")
    add("--long", choices=LONG, help="how long texts are read (default: carried; for the transformer windows)")
    add("--max_length", type=_integer(2), metavar="N", help="tokens of a window (default: those of the training)")
    add("--no_start_token", action="store_true", help="do not put the token that starts a document before a context")
    add("--batch_size", type=_integer(1), default=16, metavar="N", help="texts at a time (default 16)")
    add("--seed", type=_integer(0), default=0, metavar="N", help="random seed of sampled continuations (default 0)")
    add("--allow_code", action="store_true", help="run the code that task files of yours name")
    given = parser.parse_args(argv)
    if not (given.tasks or given.suite or given.positions):
        parser.error("give --tasks, --suite or --positions")
    if given.figure is not None and given.positions is None and not (given.suite and SUITES[given.suite].positions):
        parser.error("--figure: got a file, but nothing by position to plot; give --positions")
    if given.text and given.positions is None:
        parser.error("--text: got a text, but no --positions")
    if given.data is not None and not given.data.is_dir():
        parser.error(f"--data: got {str(given.data)!r}, which is no directory")
    return given


if __name__ == "__main__":
    command.run(main)
