"""SIGTERM and Ctrl-C, and a watchdog for a run that hangs."""

import faulthandler
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from osdn_jax.command import INTERRUPTED


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the current step is finished and saved.

    Attributes:
        result: the `Result` of the run up to this step.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(f"interrupted; saved at step {result.step:,}")
        self.result = result


class Stop:
    """Requests to end the run: SIGTERM, which schedulers send before they kill, or Ctrl-C (SIGINT).

    Use as a context manager. If one of several processes gets the signal, all of them see it at the same step. The
    previous signal handlers are restored at the end, and that of SIGINT after the first one, so that a second Ctrl-C
    does not wait for the step. A process that ignores SIGINT, such as one in the background, still ignores it.

    Attributes:
        interrupted: True if this process got Ctrl-C.
    """

    def __init__(self) -> None:
        """Prepare; signals are handled from `__enter__` on."""
        self._asked = self.interrupted = False
        self._several = False
        self._before: dict[int, Any] = {}

    def reached(self, step: int) -> bool:
        """Return True if the run has to save and end after this step. Every process must call it at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _listen(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            if self._several:
                signal.raise_signal(signal.SIGTERM)  # JAX tells all other processes

    def __enter__(self) -> "Stop":
        self._several = jax.process_count() > 1
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            # With several processes, JAX handles SIGTERM itself.
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before != signal.SIG_IGN and before is not None:
                    self._before[number] = signal.signal(number, self._listen)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


def end_at_second_interrupt() -> None:
    """Make the second Ctrl-C end this process at once, with status 130, whatever it is doing.

    Python calls signal handlers only between bytecode instructions. So a thread watches the signals as they arrive,
    which also ends a process that is compiling or waiting for a device. For command lines; a call outside the main
    thread does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_count_interrupts, args=(reading,), daemon=True).start()


def _count_interrupts(reading: int) -> None:
    seen = 0
    while seen < 2:
        seen += os.read(reading, 1)[0] == signal.SIGINT
    if sys.stdout is not None and sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # show the cursor, which a progress bar hides
    os._exit(INTERRUPTED)


class Watchdog:
    """Ends the process, with a traceback of every thread on stderr, if it makes no progress for too long.

    A process that waits for another one that hangs would wait forever. Use as a context manager.
    """

    def __init__(self, seconds: float) -> None:
        """Prepare; `seconds` is the longest time allowed between two beats, 0 disables the watchdog."""
        self._seconds = seconds

    def beat(self) -> None:
        """Report progress."""
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
