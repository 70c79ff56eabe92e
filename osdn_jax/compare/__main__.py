"""Implementations of the delta rule beside each other, under jit:  python -m osdn_jax.compare --rules kda,osdn --grad

Each implementation's outputs (and with --grad its gradients) are compared with the float64 scan, and its compile time,
run time and temporary memory with those of the scan beside it. Exit status 1 if an error exceeds its tolerance.
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
from osdn_jax.compare.measure import Result, compare_implementations, implementations, usual
from osdn_jax.compare.report import console, failures, refusals, result_table
from osdn_jax.compare.tolerances import CANCELLING, CANCELLING_FACTOR, TOLERANCES

_PROGRAM = "python -m osdn_jax.compare"
_RULES = "delta_net,gated_delta_net,kda,osdn"
_SHAPES = "B1T1024H4D64"
_MOST_BYTES = 2**46  # of inputs, where the system does not say what is free
_TOLERANCES = ", ".join(f"{name} {value:g}" for name, value in TOLERANCES.items())
_EPILOG = f"""\
--rules, --implementations, --shapes and --dtypes take one or more values, separated by commas or spaces.
A shape is {SHAPE_SYNTAX}.
Tolerances, of the norm: {_TOLERANCES};
{CANCELLING_FACTOR:g} times that for the gradients of {", ".join(name.removeprefix("d_") for name in CANCELLING)}.
Exit status: 1 if an error exceeds its tolerance, 2 for a wrong command line, else 0.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
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
    # What was measured is saved before anything is printed: the reader may have left.
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
    """Writes what --json and --plot ask for; returns what to say of it, and what went wrong."""
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
        from osdn_jax.compare.plot import plot_results  # it takes a second to import

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
    """The cases, each of them named on stderr while it is measured."""
    err = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)
        for number, case in enumerate(cases, 1):
            text = f"{number} of {len(cases)}: {' '.join(str(part) for part in case)}"
            progress.update(task, description=text)
            if not err.is_terminal:
                print(text, file=sys.stderr, flush=True)
            yield case


def _title(given: argparse.Namespace) -> str:
    shapes = {str(dataclasses.replace(s, length=1)).replace("T1H", "H") for s in given.shapes}
    parts = [given.rules[0] if len(given.rules) == 1 else "", ", ".join(given.dtypes)]
    parts.append(shapes.pop() if len(shapes) == 1 else "")
    return "Implementations of the delta rule: " + ", ".join(part for part in parts if part)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.Parser(
        prog=_PROGRAM,
        description=(__doc__ or "").split(":  ")[0] + ".",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    known = implementations()
    add = parser.add_argument
    add(
        "--rules",
        nargs="+",
        default=[_RULES],
        metavar="RULE",
        help=f"of {', '.join(COMPARED_RULES)} (default {_RULES})",
    )
    add(
        "--implementations",
        nargs="+",
        default=[",".join(usual())],
        metavar="NAME",
        help=f"of {', '.join(known)} (default {', '.join(usual())})",
    )
    add("--shapes", nargs="+", default=[_SHAPES], metavar="SHAPE", help=f"(default {_SHAPES})")
    add(
        "--dtypes", nargs="+", default=["float32"], metavar="TYPE", help=f"of {', '.join(TOLERANCES)} (default float32)"
    )
    add("--grad", action="store_true", help="measure the forward and backward pass, and check every gradient")
    add("--json", metavar="FILE", help="write the results, and what they were measured on")
    add("--plot", metavar="FILE.png", help="draw time and memory against length (give several lengths)")
    add("--repeats", default="10", metavar="N", help="rounds of timing (default 10)")
    add("--seed", default="0", metavar="N", help="of the inputs (default 0)")
    given, rest = parser.parse_known_args(argv)
    if rest:
        flags = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        parser.error(f"{rest[0]}: not known; the flags are {', '.join(flags)}")

    def names(flag: str, values: Sequence[str], known: Sequence[str]) -> list[str]:
        found = [name for value in values for name in value.split(",")]
        for name in found:
            if name not in known:
                parser.error(f"--{flag}: got {name!r}, expected some of {', '.join(known)}")
        return list(dict.fromkeys(found))

    def number(flag: str, value: str, least: int) -> int:
        if not re.fullmatch(r"\d{1,30}", value) or int(value) < least:
            parser.error(f"--{flag}: got {value!r}, expected a whole number of at least {least}")
        return int(value)

    def file(flag: str, value: str | None, allowed: Callable[[Path], bool], expected: str) -> Path | None:
        if value is None:
            return None
        if not allowed(Path(value)):
            parser.error(f"--{flag}: got {value!r}, expected {expected}")
        try:
            return command.output_file(flag, value)
        except ValueError as error:
            parser.error(str(error))

    shapes: list[Shape] = []
    for text in given.shapes:
        try:
            shapes += parse_shapes(text)
        except ValueError as error:
            parser.error(f"--shapes: {error}")
    checked: dict[str, Any] = {
        "rules": names("rules", given.rules, list(COMPARED_RULES)),
        "implementations": names("implementations", given.implementations, known),
        "shapes": list(dict.fromkeys(shapes)),
        "dtypes": names("dtypes", given.dtypes, list(TOLERANCES)),
        "grad": given.grad,
        "json": file("json", given.json, lambda path: bool(path.name), "a file"),
        "plot": file("plot", given.plot, lambda path: path.suffix.lower() == ".png", "a file that ends in .png"),
        "repeats": number("repeats", given.repeats, 1),
        "seed": number("seed", given.seed, 0),
    }
    if checked["json"] is not None and checked["json"] == checked["plot"]:
        parser.error(f"--plot: got {given.plot!r}, expected another file than that of --json")
    try:
        for shape in checked["shapes"]:
            _check_memory(shape, checked["rules"], checked["dtypes"])
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    return argparse.Namespace(**checked)


def _check_memory(shape: Shape, rules: Sequence[str], dtypes: Sequence[str]) -> None:
    """Raises ValueError where the inputs, in their type and in float64, take more memory than there is."""
    needed = max(
        input_bytes(rule, shape, dtype) + input_bytes(rule, shape, "float64") for rule in rules for dtype in dtypes
    )
    available = available_bytes() or _MOST_BYTES
    if needed > available:
        raise ValueError(
            f"got {str(shape)!r}, whose inputs alone need {needed / 1e9:,.1f} GB of memory where "
            f"{available / 1e9:,.1f} GB are free"
        )


if __name__ == "__main__":
    command.run(main)
