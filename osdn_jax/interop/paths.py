"""Paths of folders that callers give: checked before anything is read or written."""

import os
from pathlib import Path

from osdn_jax.command import local_directory


def local_folder(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Return the path of a folder on this machine, with "~" expanded; it does not have to exist.

    Args:
        path: the path.
        name: the argument's name, for errors.

    Raises:
        TypeError: it is no path.
        ValueError: it is one that `command.local_directory` refuses: empty, an address, in the home of an unknown user.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"{name}: got {type(path).__name__}, expected the path of a folder")
    try:
        return local_directory(text)
    except ValueError as error:
        raise ValueError(f"{name}: got {text!r}, expected a folder of this machine") from error


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that exists.

    Raises:
        TypeError, ValueError: as `local_folder`.
        FileNotFoundError: there is nothing at the path.
        NotADirectoryError: it is a file.
    """
    folder = local_folder(path)
    if not folder.exists():
        raise FileNotFoundError(f"path: got {str(folder)!r}, which does not exist; expected a folder of this machine")
    if not folder.is_dir():
        raise NotADirectoryError(f"path: got {str(folder)!r}, which is a file; expected the folder with config.json")
    return folder


def free_folder(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the path of a folder to write, links followed: it is absent or empty, or may be overwritten.

    Raises:
        TypeError, ValueError: as `local_folder`.
        FileExistsError: the folder is not empty and may not be overwritten, or there is a file at the path or above it.
    """
    folder = Path(os.path.realpath(local_folder(path)))
    if folder.is_symlink():  # of a circle, which leads nowhere
        raise FileExistsError(f"path: got {str(folder)!r}, a link in a circle of links; expected a new folder")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"path: got {str(folder)!r}, which is a file; expected a new folder")
    files = [parent for parent in folder.parents if parent.exists() and not parent.is_dir()]
    if files:
        raise FileExistsError(f"path: got {str(folder)!r}, but {files[0]} is a file; expected a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"path: got {str(folder)!r}, which is not empty; overwrite=True replaces the model in it")
    return folder
