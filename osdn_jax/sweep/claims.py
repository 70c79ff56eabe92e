"""Claims of processes on runs, so that no two processes train the same one."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from osdn_jax._files import naming_the_file

CLAIMS_FILE = ".claims"


class Claims:
    """The claims of this process, on names. Use as a context manager, one per process and folder.

    A claim is a lock on one byte of an empty file, at the position that the name stands for. The operating system
    releases it when the process ends, however it ends. Over NFS the server holds it for all machines.

    Example:
        >>> import tempfile
        >>> with Claims(tempfile.mkdtemp()) as claims:
        ...     claims.take("0123456789abcdef")
        True
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Open the file of a folder."""
        self._path = Path(folder) / CLAIMS_FILE
        with naming_the_file(self._path):
            self._file = self._path.open("ab")

    def take(self, name: str) -> bool:
        """Claim a name, hexadecimal digits; False if another process has it. A name of this process stays claimed."""
        try:
            with naming_the_file(self._path):
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(name))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self, name: str) -> None:
        """Give up a claim."""
        with naming_the_file(self._path):
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(name))

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def _byte(name: str) -> int:
    return int(name[:15], 16)  # below 2^60: file positions are signed and have 63 bits
