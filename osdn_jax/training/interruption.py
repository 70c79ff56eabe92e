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

from osdn_jax.command import INTERRUPTED


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the step that was under way is finished and saved.

    Attributes:
      result: what the run came to.
    """

    def __init__(self, result: Any) -> None:
        super().__init__(f"interrupted; saved at step {result.step:,}")
        self.result = result


class Stop:
    """Whether the run was asked to end, by SIGTERM as schedulers do before they kill, or by Ctrl-C (SIGINT).

    Use as a context manager. Of several processes any one may be asked, and all of them learn it at the same step.
    What the signals did before is put back at the end, and for SIGINT as soon as one has come, so that a second
    Ctrl-C does not wait for the step. A process that ignores SIGINT, as one in the background does, goes on doing so.

    Attributes:
      interrupted: whether this process has had Ctrl-C.
    """

    def __init__(self) -> None:
        """Listens from `__enter__` on."""
        self._asked = self.interrupted = False
        self._several = False
        self._before: dict[int, Any] = {}

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step; every process has to ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _listen(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            self.interrupted = True
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
            if self._several:
                signal.raise_signal(signal.SIGTERM)  # which JAX tells all the others

    def __enter__(self) -> "Stop":
        self._several = jax.process_count() > 1
        if threading.current_thread() is threading.main_thread():  # no other may listen
            # JAX listens for SIGTERM itself where there are several processes.
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
    """From now on the second Ctrl-C ends this process at once, with status 130, whatever it is doing.

    Python calls its own handlers only between two of its instructions. So a thread watches the signals as they come in:
    it also ends a process that compiles or waits for a device. For command lines; only a main thread can start it.
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
        os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os._exit(INTERRUPTED)


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
