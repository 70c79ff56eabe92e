"""What the command lines of the package share: how they end, and how they refuse a wrong flag."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rich.console import Console

USAGE_ERROR = 2  # the exit status that shells and argparse give a wrong command line
INTERRUPTED = 130  # that of a command ended by Ctrl-C
READER_LEFT = 141  # that of a command whose reader has ended before it, as in `command | head`


class Parser(argparse.ArgumentParser):
    """A parser that refuses a command line in one line: it names the flag, and the help is a flag away."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with status 2."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


class PipedConsole(Console):
    """A console whose reader may leave: that is a BrokenPipeError, which `run` ends with, as it is for `print`."""

    def on_broken_pipe(self) -> None:
        """Instead of exit status 1, which may mean something else to the command."""
        raise BrokenPipeError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls a command and ends the process with the exit status that it returns; None is 0.

    Ctrl-C ends it with 130, and a reader of its output that has ended, such as `head`, with 141; both without a word.
    """
    try:
        try:
            status = main() or 0
        except SystemExit as end:
            status = end.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # What is still to be written when Python ends goes nowhere; it would be reported otherwise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = READER_LEFT
    sys.exit(status)
