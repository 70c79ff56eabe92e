"""Agreement of the processes of a job before they start: none has failed, and all are about to do the same.

JAX aborts every process if one ends by itself; if their programs differ, they wait for each other forever or train a
model that the user did not ask for. So each process reports what it is about to do, or why it cannot, to all others.
"""

import collections
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from osdn_jax.command import USAGE_ERROR
from osdn_jax.training import distributed
from osdn_jax.training.command_line import print_error
from osdn_jax.training.config import ConfigError, flatten
from osdn_jax.training.reports import check_same, failures, software

# Errors whose message is shown to the user as it is.
_USER_ERRORS = (ValueError, TypeError, OverflowError, OSError, ImportError, flags.Error)
_BLOCK = 1 << 12  # bytes; reports are padded to whole blocks, so that few programs are compiled for them
_PATIENCE = 15.0  # seconds to wait for a file that another process has written

_outcome: Literal["agreed", "failed"] | None = None  # of this process's last call of `_settle`


def describe(config: ConfigDict, **arguments: Any) -> dict[str, Any]:
    """Return what identifies a run: its configuration by dotted key, its arguments and the software versions."""
    return {**flatten(config), **arguments, **software()}


def agree(description: Mapping[str, Any]) -> None:
    """Wait for all processes. Raises ConfigError in every one if any of them failed or describes another run."""
    if jax.process_count() > 1:
        _settle(description, None)


def fail(error: BaseException) -> NoReturn:
    """Tell the processes that wait in `agree`, then raise ConfigError, or the error itself if it is not the user's."""
    together = jax.process_count() > 1
    told = _inform(error) if together else str(error)
    if isinstance(error, _USER_ERRORS):
        raise (type(error) if isinstance(error, ConfigError) else ConfigError)(told) from error
    if together:
        distributed.leave()  # as the others do; this process may not be able to later
    raise error


def _inform(error: BaseException) -> str:
    """Report this process's error to all and return the message about every process that failed."""
    reason = str(error) if isinstance(error, _USER_ERRORS) else repr(error)
    try:
        _settle({}, "interrupted" if isinstance(error, KeyboardInterrupt) else reason)
    except ConfigError as of_all:
        reason = str(of_all)
    return reason


def by_first(call: Callable[[], object], file: Path) -> None:
    """Call a function that creates `file` in process 0, and wait until every process sees the file.

    Raises ConfigError in every process if process 0 fails or another process does not see the file; or as `fail`.
    """
    for step in (call if distributed.is_primary() else lambda: None, lambda: _see(file)):
        try:
            step()
        except BaseException as error:  # noqa: BLE001 (as in `fail`)
            fail(error)
        agree({})


def _see(file: Path) -> None:
    """Raise FileNotFoundError for a file that does not appear; network file systems may take a while."""
    end = time.monotonic() + _PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(f"{file.parent} is not the first process's; expected a directory that all share")
        time.sleep(0.1)


def tell(error: Exception, arguments: Sequence[str]) -> Exception:
    """Tell the other processes of an error and return the error that this process ends with.

    If it has not joined them yet, it does so first, provided that the command line or the environment says how.

    Raises:
        SystemExit: the error has already been printed.
    """
    users, spoke = isinstance(error, _USER_ERRORS), []

    def last_words() -> None:
        spoke.append(error)
        if users:
            print_error(error)
        else:
            traceback.print_exception(error)

    if _outcome is None and distributed.join_to_fail(arguments, last_words):
        told = _inform(error)
        error = ConfigError(told) if users else error
    if _outcome == "failed":
        distributed.leave()  # together: a process that goes alone takes the others with it
    if spoke:
        raise SystemExit(USAGE_ERROR if users else 1)
    return error


def _settle(description: Mapping[str, Any], reason: str | None) -> None:
    """Raise ConfigError, the same in every process, unless all have described the same run."""
    global _outcome
    _outcome = "failed"
    reason = None if reason is None else " ".join(reason.split())
    _check_devices(reason)
    reports = _gather({"failed": reason, "run": dict(description)})
    failed = failures([report["failed"] for report in reports])
    if failed:
        raise ConfigError(failed)
    check_same([report["run"] for report in reports])
    _outcome = "agreed"


def _check_devices(reason: str | None) -> None:
    """Raise ConfigError in every process if their numbers of devices differ, because then they could not gather."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    try:
        check_same([{"devices": counts[number]} for number in range(jax.process_count())])
    except ConfigError as error:
        raise ConfigError(reason or str(error)) from error


def _gather(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the reports of all processes, in order."""
    data = np.frombuffer(json.dumps(report, default=repr).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    room = -(-int(np.max(sizes)) // _BLOCK) * _BLOCK
    everyone = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]
