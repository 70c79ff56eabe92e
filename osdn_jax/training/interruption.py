"""The ends of a run that do not come from the run itself: a signal to stop, and a process that hangs."""

import faulthandler
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

_INTERRUPTED = 128 + signal.SIGINT  # the exit status


class Stop:
    """Whether the run was asked to end by SIGTERM, as schedulers do before they kill. Use as a context manager.

    Of several processes any one may be asked, by SIGINT too, and all of them learn it at the same step. What the
    signals did before is put back at the end.
    """

    def __init__(self) -> None:
        """Listens from `__enter__` on."""
        self._asked = False
        self._before: Any = None
        self._before_sigint: Any = None

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step; every process has to ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _listen(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __enter__(self) -> "Stop":
        # JAX listens itself where there are several processes; and only a main thread may.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._listen)
        if jax.process_count() > 1 and threading.current_thread() is threading.main_thread():
            self._before_sigint = signal.signal(signal.SIGINT, _pass_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._before_sigint is not None:
            signal.signal(signal.SIGINT, self._before_sigint)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """SIGINT in one of several processes becomes SIGTERM, which JAX listens to, and tells the others; once."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(_INTERRUPTED))
    os.kill(os.getpid(), signal.SIGTERM)


class Watchdog:
    """Ends the process, with a traceback of every thread on stderr, where nothing moves for too long.

    A process that waits for one that hangs does not come back by itself. Use as a context manager.
    """

    def __init__(self, seconds: float) -> None:
        """seconds: the longest that two beats may be apart; 0 for no watch."""
        self._seconds = seconds

    def beat(self) -> None:
        """Says that something moved."""
        if self._seconds > 0 and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)

    def __enter__(self) -> "Watchdog":
        self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._seconds > 0:
            faulthandler.cancel_dump_traceback_later()
