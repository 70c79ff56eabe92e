"""TensorBoard event files, which repeat what metrics.jsonl records."""

import contextlib
import logging
import math
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 30


class EventFile:
    """An event file that training does not depend on: after a disk error it logs one warning and stops writing.

    The calling thread writes everything. A background thread would die of a full disk unnoticed, and the caller would
    block forever once its queue is full.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new file in the folder, creating both, and tell TensorBoard to discard steps from first_step on."""
        self._folder = folder
        self._record: RecordWriter | None = None
        self._flushed = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The number prevents a restart within the same second from overwriting the previous file.
            number = len(list(folder.iterdir()))
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{number}"
            self._record = RecordWriter(str(folder.absolute() / name))
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=first_step, session_log=start))
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the finite values; TensorBoard cannot draw the others."""
        if self._record is None:
            return
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items() if math.isfinite(x)]
        try:
            self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._record.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flush and close the file."""
        if self._record is None:
            return
        try:
            self._record.flush()
            self._record.close()
            self._record = None
        except OSError as error:
            self._give_up(error)

    def _write(self, event: Event) -> None:
        if self._record is not None:
            self._record.write(event.SerializeToString())

    def _give_up(self, error: OSError) -> None:
        log.warning("no more TensorBoard events in %s: %s; metrics.jsonl has everything", self._folder, error)
        if self._record is not None:
            with contextlib.suppress(OSError):  # closes the file even if the rest cannot be written
                self._record.close()
        self._record = None
