"""What `prepare` shows while it works."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from osdn_jax.console import PipedConsole
from osdn_jax.data.shards.manifest import Shard


class PrepareBar:
    """A bar of the bytes of text on a terminal; elsewhere a plain line for each shard. Use as a context manager."""

    def __init__(self, size: int | None, *, quiet: bool = False, console: Console | None = None) -> None:
        """size: bytes of text in all, if that is known. quiet: show nothing. console: standard output by default."""
        self._console = console or PipedConsole(force_terminal=sys.stdout.isatty(), quiet=quiet)
        self._documents = self._tokens = self._new = 0
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(self._words(), total=size)

    def advance(self, tokens: int, text_bytes: int) -> None:
        """A document is done."""
        self._documents += 1
        self._tokens += tokens
        self._new += tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=text_bytes, description=self._words())

    def skipped(self, shard: Shard) -> None:
        """A shard of an earlier run is there."""
        self._documents += shard.documents
        self._tokens += shard.tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=shard.text_bytes, description=self._words())

    def finished(self, number: int) -> None:
        """A shard is complete."""
        if self._bar is None:
            self._console.print(f"shard {number} is complete: {self._words()}", markup=False, highlight=False)

    def _words(self) -> str:
        speed = self._new / max(time.monotonic() - self._started, 1e-9)
        return f"{self._documents:,} documents  {self._tokens:,} tokens  {speed:,.0f} tokens/s"

    def __enter__(self) -> "PrepareBar":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
