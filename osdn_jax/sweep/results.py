"""The results file of a sweep: one JSON object per line and finished run, which any number of processes append to."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from osdn_jax._files import naming_the_file

RESULTS_FILE = "results.jsonl"

type Record = dict[str, Any]


class Results(NamedTuple):
    """The contents of a results file.

    Attributes:
        records: one for each finished run, in the order of the file.
        damaged: a line for each line of the file that cannot be read, such as one that a crash cut short.
    """

    records: list[Record]
    damaged: list[str]


def append_result(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Append a record as one line; it is on disk when this returns.

    The file is locked (flock) meanwhile. If a crash has cut the last line short, the record starts a new line.

    Args:
        path: the file; created if it does not exist.
        record: what JSON can hold.

    Raises:
        OSError: the file cannot be written or locked; the error names it. No part of the record is left in it.
        TypeError: the record has a value that JSON cannot hold.
    """
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    with naming_the_file(path), open(path, "ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) or 0 :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a results file.

    Args:
        path: the file, or the folder that has it. A file that does not exist has no results.

    Returns:
        The records, and what could not be read.

    Example:
        >>> import tempfile
        >>> from osdn_jax.sweep import append_result, read_results
        >>> folder = tempfile.mkdtemp()
        >>> append_result(f"{folder}/results.jsonl", {"key": "a", "seed": 0})
        >>> read_results(folder)
        Results(records=[{'key': 'a', 'seed': 0}], damaged=[])
    """
    path = Path(path)
    if path.is_dir():
        path = path / RESULTS_FILE
    try:
        with naming_the_file(path):
            lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return Results([], [])
    records, damaged = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("key"), str):
            records.append(record)
        else:
            damaged.append(f"{path}, line {number} is not the record of a run, and is left out")
    return Results(records, damaged)
