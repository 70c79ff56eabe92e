"""Progress bars of training and of data preparation, and the stopwatch that training speed is measured with."""

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from osdn_jax.console import PipedConsole

log = logging.getLogger(__name__)

SPEED_WINDOW = 20  # number of updates that the speed is averaged over


class _Bar:
    """A bar on a terminal, or no bar elsewhere; as a context manager it leaves the terminal in order."""

    def __init__(
        self,
        *columns: ProgressColumn,
        console: Console | None,
        total: int | None,
        done: int = 0,
        quiet: bool = False,
    ) -> None:
        self._console = console or PipedConsole(force_terminal=sys.stdout.isatty(), quiet=quiet)
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal and not quiet:
            self._bar = Progress(*columns, console=self._console, expand=True)
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class ProgressBar(_Bar):
    """The progress of training: a bar on a terminal; elsewhere, as in a CI job's log, a line every `every` seconds.

    Use it as a context manager, which leaves the terminal in order whatever happens inside. If the output can no longer
    be written (its reader has exited, or the disk is full), that is one warning and nothing more is shown: training
    does not depend on it.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        every: float = 30.0,
        unit: str = "byte",
        console: Console | None = None,
    ) -> None:
        """Prepare the bar.

        Args:
            total_steps: the step at which training ends.
            start_step: the step that training starts or resumes from.
            every: seconds between lines without a terminal; the first update and the last step are always shown.
            unit: what the bits are counted by.
            console: where to write; standard output by default.
        """
        super().__init__(
            TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            console=console,
            total=total_steps,
            done=start_step,
        )
        self._total = total_steps
        self._every = every
        self._unit = unit
        self._last_line = -float("inf")
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=SPEED_WINDOW + 1)  # (seconds, step, tokens)
        self._started = time.monotonic()
        self._tokens = 0

    def update(self, step: int, *, tokens: int, bits_per_byte: float | None = None) -> None:
        """Show that `step` is done.

        Args:
            step: the training step.
            tokens: number of tokens trained on since the previous update.
            bits_per_byte: the loss, if known; the caller decides when to fetch it from the device.
        """
        self._tokens += tokens
        now = time.monotonic()
        self._marks.append((now, step, self._tokens))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=self._status(bits_per_byte))
        elif now - self._last_line >= self._every or step >= self._total:
            self._last_line = now
            self.print(f"step {step:,} of {self._total:,}  {self._status(bits_per_byte)}")

    def print(self, line: str) -> None:
        """Write a line, above the bar if there is one."""
        try:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        except OSError as error:
            _stop_showing(error, self._console.file is sys.stdout)
            self._console = Console(quiet=True)

    def _status(self, bits_per_byte: float | None) -> str:
        """Return the loss, speed and time left as text."""
        (first_time, first_step, first_tokens), (now, step, tokens) = self._marks[0], self._marks[-1]
        status = [] if bits_per_byte is None else [f"{bits_per_byte:.3f} bits per {self._unit}"]
        if step == first_step:  # this step includes compilation, so it says nothing about the speed
            return "  ".join([*status, f"the first step took {_duration(now - self._started)}"])
        seconds = max(now - first_time, 1e-9)
        status.append(f"{_short((tokens - first_tokens) / seconds)} tokens/s")
        status.append(f"{_duration((self._total - step) * seconds / (step - first_step))} left")
        return "  ".join(status)


class Counts(Protocol):
    """Contents of a shard: numbers of documents, tokens and bytes of text."""

    @property
    def documents(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def text_bytes(self) -> int: ...


class PrepareBar(_Bar):
    """The progress of data preparation: a bar in bytes of text on a terminal; elsewhere a line for each shard."""

    def __init__(self, size: int | None, *, quiet: bool = False, console: Console | None = None) -> None:
        """Prepare the bar; use it as a context manager.

        Args:
            size: total bytes of text, or None if unknown.
            quiet: show nothing.
            console: where to write; standard output by default.
        """
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            total=size,
            quiet=quiet,
        )
        self._documents = self._tokens = self._new_tokens = 0
        self._started = time.monotonic()
        self._show(0)

    def advance(self, tokens: int, text_bytes: int) -> None:
        """Count one document that is done."""
        self._documents += 1
        self._tokens += tokens
        self._new_tokens += tokens
        self._show(text_bytes)

    def skipped(self, shard: Counts) -> None:
        """Count a shard that an earlier run has written."""
        self._documents += shard.documents
        self._tokens += shard.tokens
        self._show(shard.text_bytes)

    def finished(self, number: int) -> None:
        """Say, without a bar, that shard `number` is complete."""
        if self._bar is None:
            self._console.print(f"shard {number} is complete: {self._status()}", markup=False, highlight=False)

    def _show(self, text_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, advance=text_bytes, description=self._status())

    def _status(self) -> str:
        speed = self._new_tokens / max(time.monotonic() - self._started, 1e-9)
        return f"{self._documents:,} documents  {self._tokens:,} tokens  {speed:,.0f} tokens/s"


class RunsBar(_Bar):
    """The progress of many runs: a bar on a terminal; elsewhere, as in a CI job's log, a line every `every` seconds."""

    def __init__(self, total: int, *, done: int = 0, every: float = 30.0, console: Console | None = None) -> None:
        """Prepare the bar; use it as a context manager.

        Args:
            total: the number of runs.
            done: the number of runs that had finished before.
            every: seconds between lines without a terminal.
            console: where to write; standard output by default.
        """
        super().__init__(
            TextColumn("{task.description}"), BarColumn(bar_width=None), console=console, total=total, done=done
        )
        self._total, self._every = total, every
        self._first, self._finished = float(done), done
        self._started = self._last_line = time.monotonic()

    def update(self, done: float, finished: int) -> None:
        """Show that `done` runs are done, with the parts of those that have not finished."""
        now = time.monotonic()
        status = f"{finished:,} of {self._total:,} runs"
        if done > self._first:
            seconds = (now - self._started) / (done - self._first) * (self._total - done)
            status += f"  {_duration(seconds)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=status)
        elif now - self._last_line >= self._every or finished >= self._total > self._finished:
            self._last_line = now
            self.print(status)
        self._finished = finished

    def print(self, line: str) -> None:
        """Write a line, above the bar if there is one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Stopwatch:
    """Seconds since `start`, without the pauses: for the speed of training without compilation, validation or saving.

    Example:
        >>> clock = Stopwatch()
        >>> began = time.perf_counter()
        >>> clock.start()
        >>> with clock.paused():
        ...     time.sleep(0.01)  # not counted
        >>> counted = clock.seconds
        >>> time.perf_counter() - began - counted > 0.01
        True
    """

    def __init__(self) -> None:
        """Create it, not running yet."""
        self._since: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        """Start from zero."""
        self._since, self._seconds = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside; it runs on afterwards, also after an exception."""
        self._seconds = self.seconds
        self._since = None
        try:
            yield
        finally:
            self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """The time so far, in seconds."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def rate(self, amount: int) -> float | None:
        """Return the amount per second; None before anything could be measured."""
        return amount / self.seconds if amount > 0 and self.seconds > 0 else None


def say(line: str) -> None:
    """Print a line of a run; if it cannot be written, that is a warning, as for `ProgressBar`."""
    try:
        print(line, flush=True)
    except OSError as error:
        _stop_showing(error, True)


def _stop_showing(error: OSError, standard_output: bool) -> None:
    """Warn, and redirect standard output to nowhere: Python would fail at exit to write what is still buffered."""
    log.warning("no more progress is shown: standard output: %s", error)
    if standard_output:
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def _short(number: float) -> str:
    """Return three digits and a unit: 1234 is "1.23 k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    """Return the two largest units of a time: "1 d 2 h", "3 h 05 min", "4 min 06 s", "7 s"."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
