"""Consoles of the command lines."""

import errno
import os

from rich.console import Console


class PipedConsole(Console):
    """A console whose reader may leave: a BrokenPipeError, as for `print`, which `command.run` knows."""

    def on_broken_pipe(self) -> None:
        """Instead of exit status 1, which may mean something else to the command."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
