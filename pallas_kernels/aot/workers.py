"""Worker processes that compile the cases.

The compiler may abort its process, and it ignores settings that are made after it has started.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue

from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.compiler import Outcome, compile_case


def compile_cases(cases: Sequence[Case], gpu: str, jobs: int) -> Iterator[Outcome]:
    """Yield the outcomes in the order of the cases, each as soon as it and all before it are known.

    Args:
        cases: to compile.
        gpu: one of `compiler.targets`.
        jobs: number of worker processes.
    """
    idle: SimpleQueue[_Worker] = SimpleQueue()
    workers = [_Worker() for _ in range(jobs)]
    for worker in workers:
        idle.put(worker)

    def compile_next(case: Case) -> Outcome:
        worker = idle.get()
        try:
            return worker.compile(case, gpu)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(jobs)
    try:
        yield from threads.map(compile_next, cases)
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.pool.shutdown()


class _Worker:
    """A process that compiles one case after another and is replaced when it dies."""

    def __init__(self) -> None:
        self.pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def compile(self, case: Case, gpu: str) -> Outcome:
        try:
            return self.pool.submit(compile_case, case, gpu).result()
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = self._start()
            return Outcome(case.name, "failed", message="the compiler ended its process")
