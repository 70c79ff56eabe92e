"""What a training run shows while it works."""

import contextlib
import logging
import os
import sys
import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from osdn_jax.console import PipedConsole

log = logging.getLogger(__name__)

SPEED_WINDOW = 20  # updates that the speed is averaged over


class ProgressBar:
    """A bar on a terminal; elsewhere, as in the log of a CI job, a plain line every `every` seconds.

    Use as a context manager: it leaves the terminal in order whatever happens inside. Where nobody reads any more, or
    the disk of a log is full, that is one warning and the rest is not shown: training does not depend on it.
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, every: float = 30.0, console: Console | None = None
    ) -> None:
        """Prepares the bar.

        Args:
          total_steps: the step at which training ends.
          start_step: the step it goes on from.
          every: seconds between plain lines; the first update and the last step's are always shown.
          console: where to write; standard output by default.
        """
        self._total = total_steps
        self._every = every
        self._spoke = -float("inf")
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=SPEED_WINDOW + 1)  # (seconds, step, tokens)
        self._started = time.monotonic()
        self._tokens = 0
        self._console = console or PipedConsole(force_terminal=sys.stdout.isatty())
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def update(self, step: int, *, tokens: int, bits_per_byte: float | None = None) -> None:
        """Shows that `step` is done.

        Args:
          step: the training step.
          tokens: how many were trained on since the update before.
          bits_per_byte: the loss, if one is known; asking the device for it is up to the caller.
        """
        self._tokens += tokens
        now = time.monotonic()
        self._marks.append((now, step, self._tokens))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._words(bits_per_byte))
        elif now - self._spoke >= self._every or step >= self._total:
            self._spoke = now
            self.print(f"step {step:,} of {self._total:,}  {self._words(bits_per_byte)}")

    def print(self, line: str) -> None:
        """Writes a line, above the bar if there is one."""
        try:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        except OSError as error:
            _stop_showing(error, self._console.file is sys.stdout)
            self._console = Console(quiet=True)

    def _words(self, bits_per_byte: float | None) -> str:
        """Loss, speed and time left in words."""
        (then, first, before), (now, last, after) = self._marks[0], self._marks[-1]
        words = [] if bits_per_byte is None else [f"{bits_per_byte:.3f} bits per byte"]
        if last == first:  # it compiled the program, and says nothing of the speed
            return "  ".join([*words, f"the first step took {_duration(now - self._started)}"])
        seconds = max(now - then, 1e-9)
        words.append(f"{_short((after - before) / seconds)} tokens/s")
        words.append(f"{_duration((self._total - last) * seconds / (last - first))} left")
        return "  ".join(words)

    def __enter__(self) -> "ProgressBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def say(line: str) -> None:
    """Prints a line of a run. Where it cannot be written, that is a warning, as for `ProgressBar`."""
    try:
        print(line, flush=True)
    except OSError as error:
        _stop_showing(error, True)


def _stop_showing(error: OSError, standard_output: bool) -> None:
    """Warns. Leads standard output nowhere, or Python would fail at its end to write what is still in memory."""
    log.warning("no more progress is shown: standard output: %s", error)
    if standard_output:
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _short(number: float) -> str:
    """Three digits and a unit: 1234 is "1.23 k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """The two largest units of a time: "1 d 2 h", "3 h 05 min", "4 min 06 s", "7 s"."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
