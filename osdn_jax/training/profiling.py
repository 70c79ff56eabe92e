"""A trace of a range of steps, for TensorBoard or Perfetto."""

import re
from pathlib import Path
from types import TracebackType
from typing import Any

import jax


def parse_range(text: str) -> tuple[int, int]:
    """Parse "A:B", the first and the last step, as (A, B). Raises ValueError."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"profile: got {text!r}, expected FIRST:LAST, two steps in order, such as 20:25")
    return int(match[1]), int(match[2])


class Profile:
    """A trace of the steps from first to last, in one file per process. Use as a context manager."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        """Prepare a trace of steps (first, last) in `folder`; None for no trace."""
        self._folder, self._steps, self._running = folder, steps, False

    def before(self, step: int) -> None:
        """Start the trace before its first step. Call this before each step."""
        if self._steps is not None and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """End the trace after its last step, once `results` are computed. Call this after each step."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(results)
            self._end()

    def _end(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
