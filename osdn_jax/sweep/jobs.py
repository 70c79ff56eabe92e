"""The processes of a sweep: started, watched, started again if they are killed, and ended."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from osdn_jax.progress import RunsBar
from osdn_jax.sweep.plan import Plan

_RESTARTS = 3  # of killed processes without a run that has finished since
_ONE_THREAD = {  # on a CPU; PJRT_NPROC is the size of the thread pools of XLA
    "PJRT_NPROC": "1",
    "NPROC": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class JobError(Exception):
    """A process of the sweep ended with an error; what it has printed says why."""


class _Job:
    """A worker process, whose messages go to a queue as (job, message); None is its end."""

    def __init__(self, order: str, messages: "queue.Queue[tuple[_Job, dict[str, Any] | None]]") -> None:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
        self.share = 0.0  # of its current runs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "osdn_jax.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | _ONE_THREAD | {"XLA_FLAGS": flags},
            process_group=0,  # Ctrl-C is for the parent, which ends its processes
        )
        self._messages = messages
        self._reader = threading.Thread(target=self._read, args=(order,), daemon=True)
        self._reader.start()

    def _read(self, order: str) -> None:
        source, sink = self.process.stdout, self.process.stdin
        if source is None or sink is None:
            return
        try:
            with sink:
                sink.write(order)
            for line in source:
                self._messages.put((self, json.loads(line)))
        except (OSError, ValueError):  # it was killed, perhaps within a line
            pass
        self._messages.put((self, None))

    def end(self) -> None:
        """End the process and wait for it."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()


def run_jobs(plan: Plan, folder: Path, jobs: int, command: str, bar: RunsBar, finished: set[str]) -> None:
    """Train what is missing of a plan, in several processes.

    Args:
        plan: the sweep.
        folder: with the results file.
        jobs: the number of processes.
        command: the command line, for the records.
        bar: shows the progress.
        finished: keys of the plan's runs that have finished; keys are added.

    Raises:
        JobError: a process ended with an error, or processes were killed again and again.
        KeyboardInterrupt: Ctrl-C; all processes have ended.
    """
    order = json.dumps({"plan": plan.as_json(), "folder": str(folder), "command": command})
    messages: queue.Queue[tuple[_Job, dict[str, Any] | None]] = queue.Queue()
    running = {_Job(order, messages) for _ in range(jobs)}
    killed = 0
    try:
        while running:
            job, message = messages.get()
            if message is None:
                status = job.process.wait()
                job.end()
                running.discard(job)
                if status > 0:
                    raise JobError(f"a process of the sweep ended with status {status}")
                if status < 0:
                    killed += 1
                    reason = signal.Signals(-status).name
                    if killed > _RESTARTS:
                        raise JobError(f"{killed} processes in a row were killed, the last one by {reason}")
                    bar.print(f"a process was killed by {reason}; another one continues with its run")
                    running.add(_Job(order, messages))
            elif "finished" in message:
                news = set(message["finished"]) - finished
                finished |= news
                job.share = 0.0
                killed = 0 if news else killed
            else:
                job.share = message["share"]
            bar.update(len(finished) + sum(job.share for job in running), len(finished))
    finally:
        for job in running:
            job.end()
