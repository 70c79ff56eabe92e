"""Worker processes that compile.

The compiler may abort its process, and it ignores settings that are made after it has started.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue
from typing import Any

from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.compiler import Outcome, compile_case

_PATIENCE = 2.0  # seconds between two looks at the parent


def compile_cases(cases: Sequence[Case], gpu: str, jobs: int) -> Iterator[Outcome]:
    """Yield the outcomes in the order of the cases, each as soon as it and all before it are known.

    Args:
        cases: to compile.
        gpu: one of `compiler.targets`.
        jobs: number of worker processes.
    """
    died = lambda case, _: Outcome(case.name, "failed", message="the compiler ended its process")
    return in_workers(compile_case, [(case, gpu) for case in cases], jobs, died)


def in_workers[T](
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], jobs: int, died: Callable[..., T]
) -> Iterator[T]:
    """Yield the results of calls in their order, each as soon as it and all before it are known.

    Args:
        function: to call in a worker process; it, its arguments and its results are pickled.
        calls: the arguments of each call.
        jobs: number of worker processes.
        died: gives the result of a call during which the process ended, of the same arguments.
    """
    idle: SimpleQueue[_Worker] = SimpleQueue()
    workers = [_Worker() for _ in range(jobs)]
    for worker in workers:
        idle.put(worker)

    def call_next(arguments: tuple[Any, ...]) -> T:
        worker = idle.get()
        try:
            return worker.call(function, arguments, died)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(jobs)
    try:
        yield from threads.map(call_next, calls)
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.pool.shutdown()


class _Worker:
    """A process that makes one call after another and is replaced when it dies."""

    def __init__(self) -> None:
        self.pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_end_with, initargs=(os.getpid(),))

    def call[T](self, function: Callable[..., T], arguments: tuple[Any, ...], died: Callable[..., T]) -> T:
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = self._start()
            return died(*arguments)


def _end_with(parent: int) -> None:
    """End this process when its parent has been killed, which a pool does not notice."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
