"""Flags of `python -m osdn_jax.evaluate`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from osdn_jax import command
from osdn_jax.evaluation.recall_tasks import NAMES
from osdn_jax.evaluation.suites import SUITES
from osdn_jax.evaluation.text_model import LONG


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


def parse_flags(program: str, description: str, argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags of a command line.

    Raises:
        SystemExit: the command line is wrong (status 2, after one line) or asks for help (status 0).
    """
    parser = command.Parser(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", required=True, help="working directory of a run of train.py")
    add(
        "--tasks",
        type=_names,
        default=[],
        metavar="NAME,NAME",
        help=f"of lm_eval: tasks, groups, tags, YAML files; of this package: {NAMES}",
    )
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
