"""Consoles of the command lines."""

import errno
import os

from rich.console import Console


class PipedConsole(Console):
    """A console that raises BrokenPipeError if its reader has exited, as `print` does; `command.run` handles it."""

    def on_broken_pipe(self) -> None:
        """Raise, in place of rich's exit status 1, which may mean something else to the command."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
