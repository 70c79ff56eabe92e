"""Compare implementations of the delta rule under jit:  python -m osdn_jax.compare --rules kda,osdn --grad

The outputs of each implementation, and with --grad its gradients, are compared with the float64 scan; its compile time,
run time and temporary memory with those of the scan in the given type. The exit status is 1 if an error exceeds its
tolerance.
"""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from osdn_jax.compare.inputs import COMPARED_RULES, SHAPE_SYNTAX, Shape, input_bytes, parse_shapes
from osdn_jax.compare.machine import available_bytes, environment
from osdn_jax.compare.measure import Result, compare_implementations, default_implementations, implementations
from osdn_jax.compare.report import console, failures, refusals, result_table
from osdn_jax.compare.tolerances import CANCELLING, CANCELLING_FACTOR, TOLERANCES

_PROGRAM = "python -m osdn_jax.compare"
_DEFAULT_RULES = ["delta_net", "gated_delta_net", "kda", "osdn"]
_DEFAULT_SHAPE = "B1T1024H4D64"
_MAX_INPUT_BYTES = 2**46  # if the system does not say how much memory is free
_TOLERANCES = ", ".join(f"{name} {value:g}" for name, value in TOLERANCES.items())
_DESCRIPTION = """\
Compare implementations of the delta rule under jit: errors against the float64 scan, compile time, run time and
temporary memory, one row for each implementation.
"""
_EPILOG = f"""\
--rules, --implementations, --shapes and --dtypes take one or more values, separated by commas or spaces.
A shape is {SHAPE_SYNTAX}.
Tolerances, relative to the norm of the reference: {_TOLERANCES};
{CANCELLING_FACTOR:g} times that for the gradients of {", ".join(name.removeprefix("d_") for name in CANCELLING)}.
Exit status: 0 if every error is within its tolerance, 1 if one exceeds it, 2 for a wrong command line or a file that
cannot be written.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0, 1 if an error exceeds its tolerance, or 2 if a file cannot be written.

    Raises:
        SystemExit: the command line is wrong (status 2) or asks for help (status 0).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _parse(argv)
    cases = [(rule, shape, dtype) for rule in given.rules for shape in given.shapes for dtype in given.dtypes]
    results: list[Result] = []
    for rule, shape, dtype in _announced(cases):
        results += compare_implementations(
            rule,
            shape,
            dtype,
            given.implementations,
            gradient=given.grad,
            repeats=given.repeats,
            seed=given.seed,
        )
    out = console()
    about = environment(shlex.join([*_PROGRAM.split(), *argv]))
    wrong = failures(results)
    where = f"{about['device']} ({about['cpu']}, {about['cpu_cores']} cores), jax {about['jax']}"
    # Files are written before anything is printed: the reader of the output may have exited.
    saved, unsaved = _save(given, results, about, f"{where}, {about['date']}", passed=not wrong)
    out.print(result_table(results, out.width), soft_wrap=True)
    for line in refusals(results):
        out.print(line, style="yellow", highlight=False, soft_wrap=True)
    for line in wrong:
        out.print(line, style="bold red", highlight=False, soft_wrap=True)
    out.print(
        f"On {where}; medians of {given.repeats} interleaved rounds; speed-up over the scan.",
        highlight=False,
        soft_wrap=True,
    )
    for line in saved:
        out.print(line, highlight=False, soft_wrap=True)
    for line in unsaved:
        print(f"{_PROGRAM}: error: {line}", file=sys.stderr)
    return command.USAGE_ERROR if unsaved else 1 if wrong else 0


def _save(
    given: argparse.Namespace, results: Sequence[Result], about: dict[str, Any], note: str, *, passed: bool
) -> tuple[list[str], list[str]]:
    """Write the files of --json and --plot; return lines about those written, and about those that failed."""
    saved: list[str] = []
    unsaved: list[str] = []
    if given.json is not None:
        record = {
            "environment": about,
            "options": {"repeats": given.repeats, "seed": given.seed, "gradient": given.grad},
            "tolerances": {**TOLERANCES, "cancelling_factor": CANCELLING_FACTOR},
            "passed": passed,
            "results": [{**dataclasses.asdict(r), "passed": r.passed} for r in results],
        }
        try:
            given.json.write_text(json.dumps(record, indent=1) + "\n")
            saved.append(f"Results: {given.json}")
        except OSError as error:
            unsaved.append(f"--json: {error}")
    if given.plot is not None:
        from osdn_jax.compare.plot import plot_results  # importing it takes a second

        try:
            if any(r.median_seconds is not None for r in results):
                plot_results(results, given.plot, title=_title(given), note=note)
                saved.append(f"Picture: {given.plot}")
            else:
                saved.append("No picture: no case was served")
        except OSError as error:
            unsaved.append(f"--plot: {error}")
    return saved, unsaved


def _announced(cases: Sequence[tuple[str, Shape, str]]) -> Iterator[tuple[str, Shape, str]]:
    """Yield the cases, naming each on stderr while it is measured."""
    err = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)
        for number, case in enumerate(cases, 1):
            text = f"{number} of {len(cases)}: {' '.join(str(value) for value in case)}"
            progress.update(task, description=text)
            if not err.is_terminal:
                print(text, file=sys.stderr, flush=True)
            yield case


def _title(given: argparse.Namespace) -> str:
    shapes = {str(dataclasses.replace(s, length=1)).replace("T1H", "H") for s in given.shapes}
    common = [given.rules[0] if len(given.rules) == 1 else "", ", ".join(given.dtypes)]
    common.append(shapes.pop() if len(shapes) == 1 else "")
    return "Implementations of the delta rule: " + ", ".join(text for text in common if text)


def _shapes(text: str) -> list[Shape]:
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not re.fullmatch(r"\d{1,30}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {least}")
        return int(text)

    return integer


def _file(flag: str, suffix: str = "") -> Callable[[str], Path]:
    def file(text: str) -> Path:
        if suffix and Path(text).suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a file that ends in {suffix}")
        try:
            return command.output_file(flag, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(f"--{flag}: ")) from error

    return file


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog=_PROGRAM,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known, default = implementations(), default_implementations()

    def add_list(flag: str, metavar: str, kind: Callable[[str], list[Any]], default: list[Any], text: str) -> None:
        parser.add_argument(
            flag, nargs="+", type=kind, action=command.Flattened, default=default, metavar=metavar, help=text
        )

    add_list(
        "--rules",
        "RULE",
        command.names(COMPARED_RULES),
        _DEFAULT_RULES,
        f"rules to compare, any of {', '.join(COMPARED_RULES)} (default {', '.join(_DEFAULT_RULES)})",
    )
    add_list(
        "--implementations",
        "NAME",
        command.names(known),
        default,
        f"implementations to compare, any of {', '.join(known)} (default {', '.join(default)})",
    )
    add_list("--shapes", "SHAPE", _shapes, parse_shapes(_DEFAULT_SHAPE), f"input shapes (default {_DEFAULT_SHAPE})")
    add_list(
        "--dtypes",
        "TYPE",
        command.names(TOLERANCES),
        ["float32"],
        f"input types, any of {', '.join(TOLERANCES)} (default float32)",
    )
    add = parser.add_argument
    add("--grad", action="store_true", help="measure the forward and backward pass, and check every gradient")
    add("--json", type=_file("json"), metavar="FILE", help="write the results and the environment to this file")
    add(
        "--plot",
        type=_file("plot", ".png"),
        metavar="FILE.png",
        help="plot time and memory against sequence length (give several lengths)",
    )
    add("--repeats", type=_integer(1), default=10, metavar="N", help="number of timing rounds (default 10)")
    add("--seed", type=_integer(0), default=0, metavar="N", help="random seed of the inputs (default 0)")
    given, rest = parser.parse_known_args(argv)
    if rest:
        flags = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        parser.error(f"{rest[0]}: unknown argument; the flags are {', '.join(flags)}")
    if given.json is not None and given.json == given.plot:
        parser.error(f"--plot: got {str(given.plot)!r}, expected another file than that of --json")
    try:
        for shape in given.shapes:
            _check_memory(shape, given.rules, given.dtypes)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    return given


def _check_memory(shape: Shape, rules: Sequence[str], dtypes: Sequence[str]) -> None:
    """Raise ValueError if the inputs, in their type and in float64, need more memory than is free."""
    needed = max(
        input_bytes(rule, shape, dtype) + input_bytes(rule, shape, "float64") for rule in rules for dtype in dtypes
    )
    available = available_bytes() or _MAX_INPUT_BYTES
    if needed > available:
        raise ValueError(
            f"got {str(shape)!r}: the inputs alone need {needed / 1e9:,.1f} GB of memory, but only "
            f"{available / 1e9:,.1f} GB are free"
        )


if __name__ == "__main__":
    command.run(main)
