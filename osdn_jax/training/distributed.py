"""Several processes as one job, on JAX's own runtime."""

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_START = 300  # seconds that processes wait for each other at the start
_HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead, and ends the job
_SHUTDOWN = 20


def start(coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None) -> None:
    """Joins the job that this process belongs to; does nothing where it is the only one.

    What is given counts; otherwise the environment: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES, a
    SLURM job of several tasks, or an indexed job of Kubernetes. To be called before anything runs on a device.

    Args:
        coordinator: host:port of process 0, which all can reach.
        process_id: of this process, from 0.
        process_count: of all.

    Raises:
        ValueError: only some of the three are given, or the id is not below the count.
        RuntimeError: the others did not come in time.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "process_count": process_count}
    missing = [name for name, value in given.items() if value is None]
    limits: dict[str, Any] = {
        "initialization_timeout": _START,
        "heartbeat_timeout_seconds": _HEARTBEAT,
        "shutdown_timeout_seconds": _SHUTDOWN,
    }
    if len(missing) == 3:
        if _in_a_job():
            jax.distributed.initialize(
                num_processes=_number("JAX_NUM_PROCESSES"), process_id=_number("JAX_PROCESS_ID"), **limits
            )
        return
    if missing:
        present = ", ".join(f"--{name}" for name in given if name not in missing)
        raise ValueError(f"{present}: expected --{' and --'.join(missing)} beside it")
    if process_id is not None and process_count is not None and not 0 <= process_id < process_count:
        raise ValueError(f"process_id: got {process_id}, expected from 0 to below process_count = {process_count}")
    jax.distributed.initialize(coordinator, process_count, process_id, **limits)


def _in_a_job() -> bool:
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    # Of the step, not of the job: one process in a job of many tasks, started by hand, is alone.
    if "SLURM_PROCID" in environment and (_number("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return True
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{variable}: got {text!r}, expected a number")
    return int(text)


def is_primary() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def meet(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def everywhere(here: bool) -> bool:
    """Whether it holds in every process; all have to ask."""
    if jax.process_count() == 1:
        return here
    return bool(np.all(multihost_utils.process_allgather(np.asarray(here))))
