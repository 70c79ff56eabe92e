"""Atomic writes, and errors of the operating system that name the file."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def file_path(name: str, value: str | os.PathLike[str]) -> Path:
    """Return the path of a file.

    Args:
        name: name of the argument, for error messages.
        value: the path.

    Raises:
        ValueError: it ends in no name, as "" and ".", or has a null character.
        TypeError: it is neither a str nor a path of one.
    """
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(text).__name__}, expected the path of a file")
    path = Path(text)
    if not path.name or "\0" in text:
        raise ValueError(f"{name}: got {text!r}, expected the path of a file")
    return path


def give_usual_permissions(path: Path) -> None:
    """Give a file or a folder the permissions that a new one gets."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def naming_the_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Add the file's name to an OSError raised inside, such as that of a full disk.

    Args:
        path: the file that is written or read inside.

    Raises:
        OSError: the error raised inside, with `path` as its file name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{error}: {os.fspath(path)!r}") from error
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the name of a new file that replaces `path` when the block ends; after an error inside, the old one stays.

    A reader, or a crash, sees either the old content or the new, never part of it.

    Args:
        path: the file; its folder must exist.

    Yields:
        The name of an empty file, in the same folder.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    path = Path(path)
    with naming_the_file(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            yield Path(name)
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
            give_usual_permissions(Path(name))  # mkstemp creates private files
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_atomically(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new, never part of it.

    Args:
        path: the file; its folder must exist.
        data: the new content; text is encoded as UTF-8.

    Raises:
        OSError: the file cannot be written; the error names it, and the old content is still there.
    """
    with replacing(path) as place:
        place.write_bytes(data.encode() if isinstance(data, str) else data)
