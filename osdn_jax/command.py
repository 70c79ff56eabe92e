"""Common behaviour of the command lines: exit statuses, Ctrl-C, and one-line errors for wrong flags."""

import argparse
import ctypes
import errno
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

# Exit statuses, as shells have them.
USAGE_ERROR = 2  # a wrong command line
INTERRUPTED = 130  # ended by Ctrl-C
READER_LEFT = 141  # the reader of its output has exited first, as in `command | head`
_MALLOPT = {-8: 1, -4: 0, -1: 2**31 - 1}  # M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's malloc.h
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line, which names the flag, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        print(f"{self.prog}: error: {message.removeprefix('argument ')}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)


def program() -> str:
    """Return what a user has typed to run this program: `python -m NAME`, or a script's file name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def output_file(flag: str, value: str, *, replaced: bool = False) -> Path:
    """Return the path of an output file, checked before the work whose results it will hold.

    Args:
        flag: the flag's name, without dashes, for the error.
        value: the flag's value; "~" is expanded.
        replaced: the file will be replaced by a new one, so a device or a pipe is an error.

    Raises:
        ValueError: `value` is a folder, or cannot be written, or its folder does not exist. The message names the flag.
    """
    path = Path(os.path.expanduser(value))
    if not path.name or path.is_dir() or (replaced and path.exists() and not path.is_file()):
        raise ValueError(f"--{flag}: got {value!r}, expected a file")
    if not path.parent.is_dir():
        raise ValueError(f"--{flag}: got {value!r}, but there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--{flag}: got {value!r}, which may not be written")
    return path


def input_file(flag: str, value: str) -> Path:
    """Return the path of a file that can be read.

    Args:
        flag: the flag's name, without dashes, for the error.
        value: the flag's value; "~" is expanded.

    Raises:
        ValueError: `value` does not exist, is a folder, or may not be read. The message names the flag.
    """
    path = Path(os.path.expanduser(value))
    if not path.exists():
        raise ValueError(f"--{flag}: got {value!r}, which does not exist")
    if path.is_dir():
        raise ValueError(f"--{flag}: got {value!r}, which is a folder, expected a file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"--{flag}: got {value!r}, which may not be read")
    return path


def naming_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a function's error message with what a user types in place of the function's arguments.

    Args:
        message: the message. An argument stands before its first colon, or with a value, as in name=True.
        flags: {argument: the flag with its dashes, or the name of a positional argument}.

    Example:
        >>> naming_flags("max_tokens: got -1, expected at least 0", {"max_tokens": "--tokens"})
        '--tokens: got -1, expected at least 0'
        >>> naming_flags("path: 'a' is not empty; overwrite=True replaces it", {"overwrite": "--overwrite"})
        "path: 'a' is not empty; --overwrite replaces it"
        >>> naming_flags("expected another name, or layout='kda'", {"layout": "--layout"})
        "expected another name, or --layout 'kda'"
    """
    for argument, flag in flags.items():
        message = re.sub(rf"^{argument}(?=(\[\d+\])?: )", flag, message)
        message = re.sub(rf"\b{argument}=True\b", flag, message)
        message = re.sub(rf"\b{argument}=(?=['\d])", f"{flag} ", message)
    return message


def local_directory(text: str) -> Path:
    """Return a directory of this machine, with "~" expanded; it does not have to exist.

    Raises:
        ValueError: the name is empty, is an address such as gs://bucket/run (which would become a folder "gs:"), is the
            home of an unknown user, or has a character that no name of a file has.
    """
    if not text.strip():
        raise ValueError("got an empty name, expected a directory, such as runs/NAME")
    if "\0" in text:
        raise ValueError("got a NUL character, expected a directory")
    os.fsencode(text)  # raises UnicodeEncodeError, a ValueError, for half of a surrogate pair
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):  # Path makes one slash of two
        raise ValueError("got an address, expected a directory on this machine or mounted on it")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def directory(flag: str, value: str) -> Path:
    """Return `local_directory` of a flag's value.

    Raises:
        ValueError: as in `local_directory`, or part of the path is a file. The message names the flag.
    """
    try:
        path = local_directory(value)
    except ValueError as error:
        raise ValueError(f"--{flag}: got {value!r}, expected a directory of this machine") from error
    files = [parent for parent in (path, *path.parents) if parent.exists() and not parent.is_dir()]
    if files:
        raise ValueError(f"--{flag}: got {value!r}, but {files[0]} is no directory")
    return path


def start() -> None:
    """Prepare for the imports of a command, which take seconds; `run` ends what this begins.

    Ctrl-C ends the process without a traceback. Garbage is not collected: the imports create 300,000 objects that stay,
    and looking through them again and again takes a fifth of the time. Freed memory is kept: on a CPU, each step of a
    training allocates the same temporary arrays, and fresh pages of memory for them take a large part of its time.
    """
    gc.disable()
    _keep_freed_memory()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))


def _keep_freed_memory() -> None:
    """Keep about 2 GB of freed memory in the process; only glibc has these settings, and before threads are created."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for name, value in _MALLOPT.items():
            mallopt(name, value)


class Flattened(argparse.Action):
    """Joins the lists that the flag's type makes of its values, without repetitions."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store the values in their order."""
        setattr(namespace, self.dest, list(dict.fromkeys(value for several in values for value in several)))


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return the type of a flag that takes some of the known names, separated by commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"got {name!r}, expected some of {', '.join(known)}")
        return found

    return parse


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call a command and end the process with the exit status that it returns; None is 0.

    Ctrl-C ends it with 130, and a reader of its output that has exited, such as `head`, with 141, both without a
    message. If output cannot be written, such as to a full disk, the error is one line, with status 2.

    Args:
        main: the command.
    """
    if not gc.isenabled():  # since `start`
        gc.freeze()  # what is imported stays: no collection has to look at it
        gc.enable()
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
        print(f"{program()}: error: {place}{error}", file=sys.stderr)
        status = USAGE_ERROR
    _discard_output()
    sys.exit(status)


def _discard_output() -> None:
    """Discard output that cannot be written; Python would report it again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
