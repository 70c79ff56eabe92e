"""Judge rules of memory on streams of keys and values, without training:  python -m osdn_jax.regression --output FOLDER

The exit status is 0, or 2 for a wrong command line, a rule that fails or a file that cannot be written.
"""

import argparse
import importlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from osdn_jax._files import write_atomically
from osdn_jax.compare.machine import environment
from osdn_jax.regression.bench import SEEDS, Results, run_bench
from osdn_jax.regression.builtin import RULES
from osdn_jax.regression.conditions import FAMILIES
from osdn_jax.regression.rules import Rule, as_rule
from osdn_jax.regression.table import best_loss, markdown, record, table

_PROGRAM = "python -m osdn_jax.regression"
_DESCRIPTION = """\
Judge rules of memory on streams of keys and values, without training: losses and residual ratios over 13 values of
beta, in float64. The whole bench takes about six minutes of one CPU core.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0, or 2 if a rule fails or a file cannot be written.

    Raises:
        SystemExit: the command line is wrong (status 2) or asks for help (status 0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _parse(argv)
    about = environment(shlex.join([*_PROGRAM.split(), *argv]))
    started = time.process_time()
    try:
        results = _measured(given)
        about["cpu_seconds"] = round(time.process_time() - started, 1)
        saved = [] if given.output is None else _save(given, results, about)
    except (TypeError, ValueError, OSError) as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return command.USAGE_ERROR
    for family in dict.fromkeys(c.family for c in results.conditions()):
        chosen = results.conditions(family)
        score = "Recall in %" if chosen[0].pairs else "Loss along the sequence"
        print(f"\n{family}: {score} at the best beta (in brackets), mean ± standard error of {results.seeds} seeds\n")
        print("\n".join(table(results, chosen, best_loss)))
    print(f"\n{about['cpu_seconds']:.0f} CPU seconds on {about['cpu']}")
    for path in saved:
        print(f"Written: {path}")
    return 0


def _measured(given: argparse.Namespace) -> Results:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.completed} of {task.total}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    seen: set[str] = set()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int, text: str) -> None:
            progress.update(task, completed=done, total=total, description=text)
            condition = text.rpartition(":")[0]
            if not console.is_terminal and condition not in seen:  # a line for each condition, as in a log
                seen.add(condition)
                print(f"{done} of {total}: {condition}", file=sys.stderr, flush=True)

        return run_bench(
            dict(given.add),
            builtin=given.rules,
            families=given.only,
            seeds=given.seeds,
            quick=given.quick,
            progress=show,
        )


def _save(given: argparse.Namespace, results: Results, about: dict[str, Any]) -> list[Path]:
    """Write the record, the page and the figures; return their paths."""
    from osdn_jax.regression.figures import figures  # importing it needs matplotlib

    given.output.mkdir(parents=True, exist_ok=True)
    pictures = given.output if given.images is None else given.images
    pictures.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record(results, about), allow_nan=False, separators=(",", ":"))
    text = text.replace('{"condition":', '\n{"condition":')
    files: dict[Path, str | bytes] = {
        given.output / "regression.json": text + "\n",
        given.output / "regression.md": "\n".join(markdown(results, about)) + "\n",
    }
    note = f"{about['command']}, {about['cpu']}, {about['date']}."
    files |= {pictures / name: data for name, data in figures(results, note)}
    for path, data in files.items():
        write_atomically(path, data)
    return list(files)


def _added(text: str) -> tuple[str, Rule]:
    """Return the name and the rule of NAME=MODULE:FUNCTION; modules are also found in the working directory."""
    match = re.fullmatch(r"(\w+)=([\w.]+):(\w+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=MODULE:FUNCTION")
    name, module, function = match.groups()
    if name in RULES:
        raise argparse.ArgumentTypeError(f"got {name!r}, the name of a built-in rule; expected another name")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return name, as_rule(name, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"got {text!r}: {error}") from error


def _integer(text: str) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return int(text)


def _folder(flag: str) -> Callable[[str], Path]:
    def folder(text: str) -> Path:
        try:
            return command.directory(flag, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--{flag}: ")) from error

    return folder


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.Parser(prog=_PROGRAM, description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        type=command.names(FAMILIES),
        action=command.Flattened,
        metavar="FAMILY",
        help=f"families of conditions, any of {', '.join(FAMILIES)} (default all)",
    )
    add(
        "--rules",
        nargs="+",
        type=command.names(RULES),
        action=command.Flattened,
        metavar="RULE",
        help=f"built-in rules, any of {', '.join(RULES)} (default all)",
    )
    add(
        "--add",
        type=_added,
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="a rule of yours: a function of (k, beta) or of (q, k, v, beta); see docs/regression.md",
    )
    add("--seeds", type=_integer, default=SEEDS, metavar="N", help=f"sequences in each condition (default {SEEDS})")
    add("--quick", action="store_true", help="a few small conditions, to try a rule in seconds; they are no results")
    add(
        "--output",
        type=_folder("output"),
        metavar="FOLDER",
        help="folder for regression.json, regression.md and figures",
    )
    add("--images", type=_folder("images"), metavar="FOLDER", help="folder of the figures (default that of --output)")
    given, rest = parser.parse_known_args(argv)
    if rest:
        flags = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        parser.error(f"{rest[0]}: unknown argument; the flags are {', '.join(flags)}")
    if given.images is not None and given.output is None:
        parser.error("--images: got a folder, but --output is not given")
    return given


if __name__ == "__main__":
    command.run(main)
