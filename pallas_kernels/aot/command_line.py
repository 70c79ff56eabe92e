"""The command line that the ahead-of-time compilation of every back end has."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_JOBS = min(4, os.cpu_count() or 1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a wrong command line in one line, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser_of(program: str, text: str, gpus: Sequence[str], default: str, recorded: str) -> argparse.ArgumentParser:
    """Return the parser of a command line.

    Args:
        program: the name in its messages.
        text: docstring of the program: its first line describes it, the rest follows the options.
        gpus: names that --gpu takes.
        default: the one without --gpu.
        recorded: what --record saves.
    """
    description, *epilog = text.split("\n", 1)
    parser = _Parser(
        prog=program,
        description=description,
        epilog="".join(epilog).strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpu", choices=gpus, default=default, help=f"GPU to compile for (default {default})")
    add(
        "--cases",
        default="",
        metavar="PATTERN",
        help="compile only cases whose name contains PATTERN; * matches anything",
    )
    add("--list", action="store_true", help="print the names of the cases and exit")
    add("--json", type=_output_file, metavar="FILE", help="write the results as JSON")
    add("--markdown", type=_output_file, metavar="FILE", help="write the table as Markdown")
    add("--jobs", type=_positive, default=_JOBS, metavar="N", help=f"number of compiler processes (default {_JOBS})")
    add("--record", action="store_true", help=f"save the {recorded} of this run as the budgets of later runs")
    return parser


def _output_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file in an existing folder")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)
