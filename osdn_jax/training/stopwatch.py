"""The speed of training, without what is not training."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Adds up time since `start`, except where it is paused."""

    def __init__(self) -> None:
        """Not running yet."""
        self._since: float | None = None
        self._seconds = 0.0

    def start(self) -> None:
        """Starts from zero."""
        self._since, self._seconds = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens inside."""
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
        """Amount per second; None before anything could be measured."""
        return amount / self.seconds if amount > 0 and self.seconds > 0 else None
