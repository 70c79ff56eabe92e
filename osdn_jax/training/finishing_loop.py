"""An event loop that finishes what was begun in it, for reads of Orbax of which one fails.

Orbax raises the error of the first array that it cannot read, and closes its event loop while other arrays are read.
Python then reports each of them on standard error, with tracebacks, before and after the error that matters.
"""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator

_PATIENCE = 30.0  # seconds to wait for reads that are left; those of a large model take longer, and are reported
_changing = threading.RLock()  # `asyncio.new_event_loop` belongs to all threads


class _FinishingLoop(asyncio.SelectorEventLoop):
    """A loop that, closed because of an error, first runs its tasks for up to `_PATIENCE` and drops their errors."""

    def close(self) -> None:
        """Close the loop, after its tasks if an exception is being handled; an interrupt does not wait for them."""
        if isinstance(sys.exception(), Exception) and not self.is_closed():
            self.run_until_complete(self._finish())
        super().close()

    async def _finish(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            await asyncio.wait([asyncio.gather(*left, return_exceptions=True)], timeout=_PATIENCE)
        await asyncio.sleep(0)  # callbacks that take the errors of tasks that had ended


@contextlib.contextmanager
def finishing_loops() -> Iterator[None]:
    """Let the event loops that are created in this context finish their tasks before an error closes them."""
    with _changing:
        original = asyncio.new_event_loop
        asyncio.new_event_loop = _FinishingLoop
        try:
            yield
        finally:
            asyncio.new_event_loop = original
