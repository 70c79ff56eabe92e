"""Putting written files at their place, so that nothing is lost if that fails or is interrupted."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from osdn_jax._files import give_usual_permissions, naming_the_file


@contextlib.contextmanager
def placed(folder: Path, *, replaced: Sequence[str], last: str) -> Iterator[Path]:
    """Give an empty folder to write into, whose files are in `folder` when the block ends.

    A folder that does not exist appears complete. In one that exists, the new files take the place of those with the
    same names and of those that match `replaced`; all other files are not touched. After an error or Ctrl-C, in the
    block or while files are moved, everything is as it was before. If the process is killed while files are moved, the
    file `last` is absent, and what was replaced is in a folder ".old.*" next to it.

    Args:
        folder: the folder, not a link.
        replaced: patterns of the names of files that are removed from an existing folder.
        last: name of the file that is put in its place last.

    Raises:
        OSError: a file cannot be written or moved; the error names the folder.
    """
    with naming_the_file(folder):
        exists = folder.is_dir()
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In an existing folder, which may be a mount point or the current directory, and stays the same one.
        place, prefix = (folder, ".new.") if exists else (folder.parent, f".{folder.name[:100]}.")
        new = Path(tempfile.mkdtemp(dir=place, prefix=prefix))
        try:
            yield new
            if exists:
                _move_into(new, folder, replaced, last)
            else:
                give_usual_permissions(new)  # mkdtemp creates private folders
                new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _move_into(new: Path, folder: Path, replaced: Sequence[str], last: str) -> None:
    """Move the files of one folder into another, and remove those that they replace."""
    names = sorted(os.listdir(new), key=lambda name: (name == last, name))
    matching = {file.name for pattern in replaced for file in folder.glob(pattern) if not _is_directory(file)}
    there = [name for name in names if os.path.lexists(folder / name)]
    directories = [name for name in there if _is_directory(folder / name)]
    if directories:
        raise FileExistsError(f"{directories[0]!r} is a folder there, expected a file")
    old = Path(tempfile.mkdtemp(dir=folder, prefix=".old."))
    leaving = sorted(matching.union(there), key=lambda name: (name != last, name))
    moves = [(folder / name, old / name) for name in leaving] + [(new / name, folder / name) for name in names]
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:
        _move_back(moves, old)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move_back(moves: Sequence[tuple[Path, Path]], old: Path) -> None:
    """Undo those moves that were made."""
    try:
        for source, target in reversed(moves):
            if not os.path.lexists(source):
                target.rename(source)
        old.rmdir()
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; the files that were there before are in {old}") from error


def _is_directory(file: Path) -> bool:
    return file.is_dir() and not file.is_symlink()
