"""The metrics of a run: `metrics.jsonl`, one JSON object per line, and TensorBoard event files."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping
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

    metrics.jsonl is the record: if it cannot be written, that is an OSError that names it. The event files only repeat
    it: if they cannot be written, that is one warning in the log.

    Example:
        >>> import tempfile
        >>> from osdn_jax.training import MetricsWriter, read_metrics
        >>> workdir = tempfile.mkdtemp()
        >>> with MetricsWriter(workdir) as metrics:
        ...     metrics.write(1, {"train/bits_per_byte": 7.5})
        >>> read_metrics(workdir)
        [{'step': 1, 'train/bits_per_byte': 7.5}]
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        enabled: bool = True,
        on_metrics: Callable[[int, dict[str, float]], object] | None = None,
    ) -> None:
        """Open the files.

        Args:
            workdir: created if missing.
            resume_step: the step of the checkpoint that training resumes from. Later rows, which training will write
                again, are dropped, and so is a last line that a crash cut short. None: start from the beginning, all
                rows are dropped.
            enabled: False writes nothing, for all processes of a job but one.
            on_metrics: called as on_metrics(step, values) after each row is written, with a new dict of floats; a value
                that is not finite, null in the file, is passed as it is. Not called if `enabled` is False.

        Raises:
            ValueError: a line of metrics.jsonl other than its last is damaged.
            OSError: metrics.jsonl cannot be written, e.g. because the disk is full; it is left as it was.
        """
        self._file: FileIO | None = None
        self._last: int | None = None
        self._on_metrics = on_metrics
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
        """Write one row; it is in the file when this returns.

        Args:
            step: the training step, not below that of the row before. Several rows may have the same step.
            values: {name: number}, such as "train/bits_per_byte"; anything with one element counts as a number. NaN and
                infinities are null in the JSON, which cannot express them, and left out of TensorBoard's files.

        Raises:
            ValueError: a step below that of the row before; "step" among the names.
            TypeError: a value that is no number.
            OSError: the row cannot be written, e.g. because the disk is full; the rows before it stay whole.
            Exception: whatever on_metrics raises, with a note that says so.
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
        if self._on_metrics is not None:
            try:
                self._on_metrics(self._last, {name: float(x) for name, x in numbers.items()})
            except BaseException as error:
                error.add_note(f"raised by on_metrics, called with the metrics of step {self._last}")
                raise

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
                os.ftruncate(file.fileno(), end)  # leave no partial line
            raise

    def close(self) -> None:
        """Close the files."""
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
    """Read the rows of a metrics.jsonl, in order.

    A last line that a crash cut short is left out.

    Args:
        path: the file, or the working directory that has it.

    Returns:
        One dict per row: "step" and the metrics; a value that was not finite is None.

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
            if number == len(lines):  # a complete line ends in a newline, so an empty string follows it
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
    if array.size != 1 or array.dtype.kind not in "biufV":  # V: bfloat16 and the like
        raise TypeError(f"metric {name!r} is no number: {value!r}")
    if array.dtype.kind == "V":
        array = array.astype(np.float32)
    return array.item() if array.dtype.kind in "iuf" else int(array.item())


def _line(row: Row) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
