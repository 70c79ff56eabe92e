"""Runner of jobs as processes: they prepare in parallel, then timed jobs run alone, one after the other.

A job that raises, dies or hangs loses its rows and nothing else.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import NOT_RUN, OUT_OF_TIME, Emit, Job, Row, missing_rows
from triton_kernels.common import installation

ROOT = Path(__file__).parents[2]
POLL = 0.05  # seconds

PREPARING = 0.55  # fraction of the remaining budget in which timed jobs prepare
GRACE = 15.0  # seconds for those that are still compiling then
RESERVE = 5.0  # seconds at the end of the budget, for writing the files
STARTING = 60.0  # seconds for a process to import its modules, while others do the same


@dataclasses.dataclass(frozen=True)
class Patience:
    """Seconds that a process may go without a sign of life: a row, or an event that announces the next step."""

    prepared: float  # until it is prepared, or finished if it is not timed
    alone: float
    starting: float = STARTING  # until its first sign


@dataclasses.dataclass(frozen=True)
class Clock:
    """A budget in seconds from a start in the time of time.time()."""

    budget: float
    start: float = dataclasses.field(default_factory=time.time)

    def prepare_until(self) -> float:
        """Return the time by which jobs that run alone should be prepared."""
        now = time.time()
        return now + PREPARING * max(0.0, self.until - now)

    @property
    def until(self) -> float:
        return self.start + self.budget - RESERVE

    def spent(self) -> float:
        return time.time() - self.start


class Running:
    """A job's process, the rows it has written, and the end of its log."""

    def __init__(self, job: Job, times: Row, folder: Path, number: int, environment: dict[str, str]) -> None:
        self.job = job
        self.rows: list[Row] = []
        self.began = time.time()
        self.signs, self.last = 0, self.began
        self.prepared = self.ended = False
        self._file, self._log = folder / f"{number}.jsonl", folder / f"{number}.log"
        self._read = 0
        spec = {**job.spec, **times}
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
                process_group=0,  # so that processes it starts are killed with it
            )

    def new_rows(self) -> list[Row]:
        """Return what was written since the last call, with events split off."""
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
            self.signs, self.last = self.signs + 1, time.time()
            row = json.loads(line)
            if "event" not in row:
                new.append(row)
            self.prepared = self.prepared or row.get("event") == "prepared"
        self.rows += new
        return new

    def turn(self) -> None:
        """Let a prepared job continue."""
        self.last = time.time()
        with contextlib.suppress(BrokenPipeError):  # it has died, which the caller notices
            print("go", file=self.process.stdin, flush=True)

    def over(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """Kill it if it is still running."""
        if self.ended:
            return
        self.ended = True
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # and the processes that it has started
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: nothing more can be done
            self.process.wait(2)

    def last_words(self) -> str:
        """Return the exit status and the last line of the log."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit status {self.process.returncode}" + (f": {lines[-1][:300]}" if lines else "")


class Runner:
    """Runs jobs in order, at most `slots` at a time, within a budget."""

    def __init__(self, clock: Clock, folder: Path, slots: int, environment: dict[str, str], emit: Emit) -> None:
        self.clock, self.folder, self.slots, self.environment, self.emit = clock, folder, slots, environment, emit
        self.count = 0

    def run(self, jobs: Sequence[Job], patience: Patience, *, timed: bool, most: int | None = None) -> None:
        """Run all jobs in parallel; timed jobs only prepare in parallel, then each runs alone, in order.

        Args:
            jobs: to run.
            patience: with their silence.
            timed: they need the device alone.
            most: jobs that are prepared before they run; default all. The next ones are prepared after them.
        """
        size = len(jobs) if most is None or not timed else most
        for start in range(0, len(jobs), max(1, size)):
            self._run(jobs[start : start + size], patience, timed=timed)

    def _run(self, jobs: Sequence[Job], patience: Patience, *, timed: bool) -> None:
        started: list[Running] = []
        until = self.clock.prepare_until() if timed else self.clock.until
        try:
            self._together(list(jobs), started, patience, until, GRACE if timed else 0.0)
            for r in started:
                if r.prepared:
                    self._alone(r, patience)
        finally:
            for r in started:
                r.end()

    def _together(
        self, waiting: list[Job], started: list[Running], patience: Patience, until: float, grace: float
    ) -> None:
        running: list[Running] = []
        while waiting or running:
            if time.time() >= until:
                for job in waiting:
                    self._close(job, [], NOT_RUN, OUT_OF_TIME)
                waiting = []
            while waiting and len(running) < self.slots:
                running.append(self._start(waiting.pop(0), until))
                started.append(running[-1])
            for r in list(running):
                over = r.over()  # before the rows are read: none can follow
                self._take(r)
                silence = patience.prepared if r.signs else max(patience.prepared, patience.starting)
                if over and not r.prepared:
                    self._finish(r)
                elif not r.prepared and not self._late(r, silence, until + grace):
                    continue
                running.remove(r)
            time.sleep(POLL)

    def _alone(self, r: Running, patience: Patience) -> None:
        if time.time() > self.clock.until:
            r.end()
            self._close(r.job, r.rows, NOT_RUN, OUT_OF_TIME)
            return
        r.turn()
        while not r.over():
            self._take(r)
            if self._late(r, patience.alone, self.clock.until + RESERVE):
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

    def _late(self, r: Running, silence: float, until: float) -> bool:
        """Kill a job that has been silent for too long, or that is still running at a time; return True if so."""
        now = time.time()
        if now < min(r.last + silence, until):
            return False
        hung = now >= r.last + silence
        r.end()
        self._take(r)
        if hung:
            self._close(
                r.job, r.rows, "hung", f"no sign of life for {silence:.0f} s, {now - r.began:.0f} s after it began"
            )
        else:
            self._close(r.job, r.rows, NOT_RUN, OUT_OF_TIME)
        return True

    def _finish(self, r: Running) -> None:
        self._close(r.job, r.rows, "died", r.last_words())

    def _close(self, job: Job, rows: Sequence[Row], status: str, reason: str) -> None:
        for row in missing_rows(job.owed, rows, status, reason):
            self.emit(row)


def worker_environment(given: Any, dry: bool, implementations: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment of the jobs' processes.

    Two frameworks and many processes share the device, so none preallocates its memory. Choices that
    flash-linear-attention's autotuner makes while other programs run are not cached.
    """
    out = {**given, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "FLA_CACHE_RESULTS": "0", "PYTHONUNBUFFERED": "1"}
    out["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [given.get("PYTHONPATH")])])
    if "triton_interpret" in implementations:
        out[installation.VARIABLE] = "1"  # before Triton is imported
    return {**out, "JAX_PLATFORMS": "cpu"} if dry else out
