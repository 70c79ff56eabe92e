"""The numbers of a run: `metrics.jsonl`, one JSON object a line, and TensorBoard event files beside it."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from osdn_jax._files import naming_the_file, write_atomically
from osdn_jax.training.events import EventFile

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

type Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl` and `workdir/tensorboard`. Use as a context manager, or call `close`.

    metrics.jsonl is the record: what cannot be written there is an OSError that names it. Event files only repeat it:
    if they cannot be written, that is one warning in the log.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, resume_step: int | None = None, enabled: bool = True
    ) -> None:
        """Opens the files.

        Args:
          workdir: created if need be.
          resume_step: the step of the checkpoint that training goes on from: later rows, which training will write
            again, are dropped, and so is a last line that a crash cut short. None is a start from the beginning: all
            rows are dropped.
          enabled: False writes nothing at all, for all but one of the processes of a job.

        Raises:
          ValueError: metrics.jsonl is damaged elsewhere than in its last line.
          OSError: metrics.jsonl cannot be written, such as on a full disk; it is left as it was.
        """
        self._file: FileIO | None = None
        self._last: int | None = None
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / METRICS_FILE
        first = 0 if resume_step is None else resume_step + 1
        rows = [] if resume_step is None or not self._path.exists() else read_metrics(self._path)
        kept = [row for row in rows if row["step"] < first]
        write_atomically(self._path, "".join(_line(row) for row in kept))
        self._last = kept[-1]["step"] if kept else None
        self._file = FileIO(self._path, "a")  # unbuffered: closing it writes nothing, and so cannot fail
        self._board = EventFile(workdir / TENSORBOARD_FOLDER, first)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row; it is in the file when this returns.

        Args:
          step: the training step, not below the one before. Several rows may share a step.
          values: {name: number}, such as "train/bits_per_byte"; anything with one element counts as a number. NaN and
            infinities are null in the JSON, which has no word for them, and left out of TensorBoard's files.

        Raises:
          ValueError: a step below the one before; "step" among the names.
          TypeError: a value that is no number.
          OSError: the row cannot be written, such as on a full disk; those before it stay whole.
        """
        if self._last is not None and step < self._last:
            raise ValueError(f"step {step} comes after step {self._last}")
        if "step" in values:
            raise ValueError("'step' is the row's own key and cannot be a metric")
        numbers = {name: _number(name, value) for name, value in values.items()}
        self._last = int(step)
        if self._file is None:
            return
        self._append(_line({"step": self._last} | numbers).encode())
        self._board.add(self._last, numbers)

    def _append(self, line: bytes) -> None:
        file = self._file
        if file is None:
            return
        end, rest = os.fstat(file.fileno()).st_size, memoryview(line)
        try:
            with naming_the_file(self._path):
                while rest:
                    rest = rest[file.write(rest) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), end)  # no part of a line stays
            raise

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics.jsonl (or of the one in a working directory), in order.

    A last line that a crash cut short is left out.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another line is not a JSON object of numbers with a step; names the line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # a whole line has its newline, so an empty piece after it
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f"{path}, line {number} has no step: {_short(row)}")
        for name, value in row.items():
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"{path}, line {number}: {name!r} is no number: {_short(value)}")
        rows.append(row)
    return rows


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biufV":  # V: bfloat16 and its kin
        raise TypeError(f"metric {name!r} is no number: {value!r}")
    if array.dtype.kind == "V":
        array = array.astype(np.float32)
    return array.item() if array.dtype.kind in "iuf" else int(array.item())


def _line(row: Row) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
