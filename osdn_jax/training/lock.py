"""A lock that keeps two runs from using one directory."""

import contextlib
import datetime
import fcntl
import logging
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import IO

from osdn_jax.training.config import ConfigError

LOCK_FILE = ".lock"

log = logging.getLogger(__name__)


class WorkdirInUseError(ConfigError):
    """Another run is using the working directory; the message names its process, machine and time."""


class WorkdirLock:
    """Keeps other runs out of a working directory. Use as a context manager, in the first process of a job only.

    A file in the directory is locked (flock) and names the holder: process, machine and time. The operating system
    releases the lock when the process ends, however it ends, so a file that a killed process left behind locks nothing.
    Over NFS the server holds the lock for all machines. On a file system without locks the directory is not protected,
    and a warning in the log says so. Reading a run needs no lock.
    """

    def __init__(self, workdir: Path) -> None:
        """Prepare; `workdir` is created on entering if it does not exist."""
        self._workdir = workdir
        self._file: IO[str] | None = None

    def __enter__(self) -> "WorkdirLock":
        """Take the lock. Raises WorkdirInUseError if another run has the directory."""
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / LOCK_FILE
        while self._file is None:
            file = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # the latter over NFS
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise WorkdirInUseError(
                    f"{self._workdir} is in use by {holder}; wait until that run has ended, or give another --workdir"
                ) from None
            except OSError as error:
                file.close()
                log.warning("%s cannot be locked (%s): no other run must use the directory", path, error.strerror)
                return self
            if _is_at(file, path):
                self._file = file
            else:  # its holder has just removed it
                file.close()
        with contextlib.suppress(OSError):  # on a full disk the lock still holds
            self._file.truncate(0)
            now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                (self._workdir / LOCK_FILE).unlink()  # while it is locked, so that no other process can have this file
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def _is_at(file: IO[str], path: Path) -> bool:
    """Return True if the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
