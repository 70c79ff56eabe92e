"""What the command lines of the package share: how they end, and how they refuse a wrong flag."""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

USAGE_ERROR = 2  # the exit status that shells and argparse give a wrong command line
INTERRUPTED = 130  # that of a command ended by Ctrl-C
READER_LEFT = 141  # that of a command whose reader has ended before it, as in `command | head`
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Parser(argparse.ArgumentParser):
    """A parser that refuses a command line in one line: it names the flag, and the help is a flag away."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with status 2."""
        print(f"{self.prog}: error: {message.removeprefix('argument ')}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def output_file(flag: str, value: str, *, replaced: bool = False) -> Path:
    """Checks a file that a flag names before the work whose results it will hold.

    Raises ValueError, naming the flag, for a folder, for a file in a folder that does not exist or may not be written,
    and, if the file will be replaced by another (`replaced`), for a device or a pipe.
    """
    path = Path(os.path.expanduser(value))
    if not path.name or path.is_dir() or (replaced and path.exists() and not path.is_file()):
        raise ValueError(f"--{flag}: got {value!r}, expected a file")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag}: got {value!r}, but there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--{flag}: got {value!r}, which may not be written")
    return path


def local_directory(text: str) -> Path:
    """The directory that a user means, with "~" expanded; it does not have to exist.

    Raises ValueError, saying why, for an empty name, for an address such as gs://bucket/run, which would become a
    folder "gs:", and for the home of an unknown user.
    """
    if not text.strip():
        raise ValueError("got an empty name, expected a directory, such as runs/NAME")
    if "\0" in text:
        raise ValueError("got a NUL character, expected a directory")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):  # Path makes one slash of two
        raise ValueError("got an address, expected a directory on this machine or mounted on it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def directory(flag: str, value: str) -> Path:
    """As `local_directory`, of a flag. Raises ValueError, naming the flag, also where a part of the path is a file."""
    try:
        path = local_directory(value)
    except ValueError as error:
        raise ValueError(f"--{flag}: got {value!r}, expected a directory of this machine") from error
    files = [place for place in (path, *path.parents) if place.exists() and not place.is_dir()]
    if files:
        raise ValueError(f"--{flag}: got {value!r}, but {files[0]} is no directory")
    return path


def start() -> None:
    """Lets Ctrl-C end the process without a traceback until `run` is called, while modules are imported for seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls a command and ends the process with the exit status that it returns; None is 0.

    Ctrl-C ends it with 130, and a reader of its output that has ended, such as `head`, with 141, both without a
    message. Output that cannot be written, to a full disk say, is one line and status 2.
    """
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status: int | str | None
    try:
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = READER_LEFT
    except OSError as error:
        place = "standard output: " if error.filename is None and error.errno in _DISK_ERRORS else ""
        print(f"{Path(sys.argv[0]).name}: error: {place}{error}", file=sys.stderr)
        status = USAGE_ERROR
    _give_up_output()
    sys.exit(status)


def _give_up_output() -> None:
    """Discards output that cannot be written, which Python would report once more when it ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
