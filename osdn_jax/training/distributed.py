"""Several processes as one job, on JAX's distributed runtime."""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from osdn_jax._errors import first_line
from osdn_jax.training.rendezvous import gather, parse_address
from osdn_jax.training.reports import check_same, software

_START = 300  # seconds that processes wait for each other when they start
_FAREWELL = 20  # the same, for a process that joins only to report why it ends
_HEARTBEAT = 20  # seconds without a heartbeat after which a process counts as dead, which ends the job
_SHUTDOWN = 20
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES")

_state: Literal["apart", "joining", "joined"] = "apart"  # of this process, which tries to join only once


def start(
    coordinator: str | None = None,
    process_id: int | None = None,
    process_count: int | None = None,
    *,
    seconds: int = _START,
) -> None:
    """Join the job that this process belongs to; do nothing if it is the only process.

    Arguments take precedence over the environment: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID and JAX_NUM_PROCESSES, a
    SLURM job of several tasks, or an indexed job of Kubernetes. Call this before anything runs on a device.

    Args:
        coordinator: address HOST:PORT of process 0, which all processes can reach.
        process_id: index of this process, from 0.
        process_count: total number of processes.
        seconds: how long to wait for the others.

    Raises:
        ValueError: only some of the three are given, one of them is out of range, or the processes were given
            different counts or run different versions of the software.
        RuntimeError: the coordinator's address cannot be used, or the others did not join in time.
    """
    global _state
    _state = "joining"
    given = {"coordinator": coordinator, "process_id": process_id, "process_count": process_count}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3:
        if _in_a_job():
            _join(os.environ.get(_VARIABLES[0]), _number(_VARIABLES[1]), _number(_VARIABLES[2]), _VARIABLES, seconds)
    elif missing:
        present = ", ".join(f"--{name}" for name in given if name not in missing)
        raise ValueError(f"{present}: expected --{' and --'.join(missing)} beside it")
    else:
        _join(coordinator, process_id, process_count, ("coordinator", "process_id", "process_count"), seconds)
    _state = "joined"


def _join(
    coordinator: str | None,
    process_id: int | None,
    process_count: int | None,
    names: tuple[str, str, str],
    seconds: int,
) -> None:
    """Join with the given values; JAX finds those that are None. names: what the user calls the three."""
    if process_count is not None and process_count < 1:
        raise ValueError(f"{names[2]}: got {process_count}, expected at least 1")
    if process_id is not None and not 0 <= process_id < (process_count or math.inf):
        below = "" if process_count is None else f" to below {names[2]} = {process_count}"
        raise ValueError(f"{names[1]}: got {process_id}, expected from 0{below}")
    address = None if coordinator is None else parse_address(coordinator, names[0])
    if address is not None and process_id is not None and process_count is not None and process_count > 1:
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
        listen = None if bind is None else parse_address(bind, "JAX_COORDINATOR_BIND_ADDRESS")
        check_same(gather(address, process_id, process_count, software(), seconds=seconds, bind=listen))
    try:
        jax.distributed.initialize(
            coordinator,
            process_count,
            process_id,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except RuntimeError as error:
        raise RuntimeError(f"cannot join the other processes: {first_line(error)}") from error


def join_to_fail(arguments: Sequence[str], last_words: Callable[[], None]) -> bool:
    """Return True if this process is one of several that have joined; join them if it has not tried to.

    Args:
        arguments: its command line, of which only the three flags that `start` takes are read.
        last_words: called first if a scheduler knows the other processes: without the coordinator's address this
            process cannot check that they come, and JAX aborts it if they do not.
    """
    if _state == "apart":
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for name, kind in (("coordinator", str), ("process_id", int), ("process_count", int)):
            parser.add_argument(f"--{name}", f"-{name}", type=kind)
        try:
            given = vars(parser.parse_known_args(list(arguments))[0])
            if given["coordinator"] is None and _in_a_job() and not set(_VARIABLES) <= set(os.environ):
                last_words()
            start(**given, seconds=_FAREWELL)
        except (argparse.ArgumentError, ValueError, RuntimeError):
            return False
    return _state == "joined" and jax.distributed.is_initialized() and jax.process_count() > 1


def leave() -> None:
    """Leave the job when all others do: the first to leave alone would end them too."""
    with contextlib.suppress(RuntimeError):
        jax.distributed.shutdown()


def _in_a_job() -> bool:
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    # The step's tasks, not the job's: a process started by hand in a job of many tasks is alone.
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
    """Return True in the process that writes what is written only once (process 0)."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until all processes have called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_processes(holds: bool) -> bool:
    """Return True if `holds` is true in every process. Must be called by every process."""
    if jax.process_count() == 1:
        return holds
    return bool(np.all(multihost_utils.process_allgather(np.asarray(holds))))
