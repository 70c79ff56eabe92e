"""Runs jobs as processes: they prepare side by side, and what is timed then runs alone.

A job that raises, dies or hangs costs its own rows and nothing else.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import OUT_OF_TIME, Job, Row, missing_rows

ROOT = Path(__file__).parents[2]
POLL = 0.05  # seconds

# Until when the stages prepare, as parts of the budget: the checks run meanwhile. Then the grace for what is still
# compiling, and what is kept back at the end for the files.
PREPARING, GRACE, RESERVE = (0.55, 0.9), 15.0, 5.0
ALONE = 0.25  # the part of the patience with a job that what it does alone may take

Emit = Callable[[Row], None]


@dataclasses.dataclass(frozen=True)
class Clock:
    """A budget in seconds from a start, as time.time() counts."""

    budget: float
    start: float = dataclasses.field(default_factory=time.time)

    def prepare_until(self, stage: int) -> float:
        return self.start + PREPARING[stage] * self.budget

    @property
    def until(self) -> float:
        return self.start + self.budget - RESERVE

    def spent(self) -> float:
        return time.time() - self.start


class Running:
    """A job's process, the rows that it has written, and the end of its log."""

    def __init__(self, job: Job, times: Row, folder: Path, number: int, environment: dict[str, str]) -> None:
        self.job = job
        self.rows: list[Row] = []
        self.began = time.time()
        self.prepared = False
        self._file, self._log = folder / f"{number}.jsonl", folder / f"{number}.log"
        self._read = 0
        spec = {**job.spec, **times, "folder": str(folder)}
        command = [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(spec), str(self._file)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                process_group=0,  # it may start others, which end with it
            )

    def new_rows(self) -> list[Row]:
        """What has been written since the last time, events apart."""
        if not self._file.exists():
            return []
        with self._file.open() as file:
            file.seek(self._read)
            lines = file.readlines()
        new: list[Row] = []
        for line in lines:
            if not line.endswith("\n"):
                break  # it is still being written
            self._read += len(line.encode())
            row = json.loads(line)
            if row.get("event") == "prepared":
                self.prepared = True
            else:
                new.append(row)
        self.rows += new
        return new

    def turn(self) -> None:
        """Lets a prepared job go on."""
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile, which is found out elsewhere
            print("go", file=self.process.stdin, flush=True)

    def over(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Ends it where it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # with what it has started
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver holds it: nobody can do more
            self.process.wait(10)

    def last_words(self) -> str:
        """The exit status and the last line of the log."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit status {self.process.returncode}" + (f": {lines[-1][:300]}" if lines else "")


class Runner:
    """Runs jobs in order, as many at once as there are slots, within a budget."""

    def __init__(self, clock: Clock, folder: Path, slots: int, patience: float, dry: bool, emit: Emit) -> None:
        self.clock, self.folder, self.slots, self.patience, self.emit = clock, folder, slots, patience, emit
        self.environment = worker_environment(os.environ, dry)
        self.count = 0

    def run(self, stages: Sequence[Sequence[Job]]) -> None:
        """Stage by stage: all jobs prepare at once, then each that waits for it runs alone, in their order."""
        for number, stage in enumerate(stages):
            started: list[Running] = []
            try:
                self._prepare(list(stage), started, self.clock.prepare_until(number))
                for r in started:
                    if r.prepared:
                        self._alone(r)
            finally:
                for r in started:
                    r.end()

    def _prepare(self, waiting: list[Job], started: list[Running], until: float) -> None:
        running: list[Running] = []
        while waiting or running:
            if time.time() >= until:
                for job in waiting:
                    self._close(job, [], "left out", OUT_OF_TIME)
                waiting = []
            while waiting and len(running) < self.slots:
                running.append(self._start(waiting.pop(0), until))
                started.append(running[-1])
            for r in list(running):
                over = r.over()  # before the rows are read: none can follow
                self._take(r)
                if over and not r.prepared:
                    self._finish(r)
                elif not r.prepared and not self._late(r, r.began + self.patience, until + GRACE):
                    continue
                running.remove(r)
            time.sleep(POLL)

    def _alone(self, r: Running) -> None:
        began = time.time()
        if began > self.clock.until:
            r.end()
            self._close(r.job, r.rows, "left out", OUT_OF_TIME)
            return
        r.turn()
        while not r.over():
            self._take(r)
            if self._late(r, began + ALONE * self.patience, self.clock.until + RESERVE):
                return
            time.sleep(POLL)
        self._take(r)
        self._finish(r)

    def _start(self, job: Job, until: float) -> Running:
        self.count += 1
        times = {"prepare_until": until, "until": self.clock.until}
        return Running(job, times, self.folder, self.count, self.environment)

    def _take(self, r: Running) -> None:
        for row in r.new_rows():
            self.emit(row)

    def _late(self, r: Running, hung: float, until: float) -> bool:
        """Kills a job that has run past one of the two times."""
        now = time.time()
        if now < min(hung, until):
            return False
        r.end()
        self._take(r)
        if now >= hung:
            self._close(r.job, r.rows, "hung", f"it did not end within {now - r.began:.0f} s of its start")
        else:
            self._close(r.job, r.rows, "left out", OUT_OF_TIME)
        return True

    def _finish(self, r: Running) -> None:
        self._close(r.job, r.rows, "died", r.last_words())

    def _close(self, job: Job, rows: Sequence[Row], status: str, reason: str) -> None:
        for row in missing_rows(job.owed, rows, status, reason):
            self.emit(row)


def worker_environment(given: Any, dry: bool) -> dict[str, str]:
    """Two frameworks and many processes share the device: none takes all of its memory beforehand.

    What flash-linear-attention's autotuner finds beside other programs is not kept.
    """
    out = {**given, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "FLA_CACHE_RESULTS": "0", "PYTHONUNBUFFERED": "1"}
    out["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [given.get("PYTHONPATH")])])
    return {**out, "JAX_PLATFORMS": "cpu"} if dry else out
