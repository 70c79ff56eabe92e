"""Compiles cases in processes of their own: the compiler may end its process, and takes no settings once it runs."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue

from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.compiler import Outcome, compile_case


def compile_cases(cases: Sequence[Case], gpu: str, jobs: int) -> Iterator[Outcome]:
    """The outcomes in the order of the cases, each as soon as it and those before it are known."""
    free: SimpleQueue[_Worker] = SimpleQueue()
    workers = [_Worker() for _ in range(jobs)]
    for worker in workers:
        free.put(worker)

    def compile_next(case: Case) -> Outcome:
        worker = free.get()
        try:
            return worker.compile(case, gpu)
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(jobs)
    try:
        yield from threads.map(compile_next, cases)
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.pool.shutdown()


class _Worker:
    """One process that goes on, and a new one after it has ended."""

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
