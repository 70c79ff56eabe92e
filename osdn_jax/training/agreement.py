"""What the processes of a job agree on before they start together: none has failed, and all do the same.

JAX ends every process with an abort where one ends by itself, and where their programs differ they wait for each other,
or train a model that nobody asked for. So each says what it is about to do, or why it cannot, and all read that.
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

# Whose message is for the user as it is.
_USER_ERRORS = (ValueError, TypeError, OverflowError, OSError, ImportError, flags.Error)
_BLOCK = 1 << 12  # bytes; reports travel in whole blocks, so that few programs are compiled for them
_PATIENCE = 15.0  # seconds until a file that another process has written is here

_outcome: Literal["agreed", "failed"] | None = None  # of the last time that this process settled with others


def describe(config: ConfigDict, **arguments: Any) -> dict[str, Any]:
    """What a run is: its configuration by dotted key, its arguments, and the software."""
    return {**flatten(config), **arguments, **software()}


def agree(description: Mapping[str, Any]) -> None:
    """Waits for all processes. Raises ConfigError in every one if any of them failed, or describes another run."""
    if jax.process_count() > 1:
        _settle(description, None)


def fail(error: BaseException) -> NoReturn:
    """Tells the processes that wait in `agree`, then raises ConfigError, or the error itself if it is no user's."""
    together = jax.process_count() > 1
    told = _inform(error) if together else str(error)
    if isinstance(error, _USER_ERRORS):
        raise (type(error) if isinstance(error, ConfigError) else ConfigError)(told) from error
    if together:
        distributed.leave()  # as the others do; this process may not get the chance later
    raise error


def _inform(error: BaseException) -> str:
    """What all processes say of this one's error, and of others that failed too."""
    reason = str(error) if isinstance(error, _USER_ERRORS) else repr(error)
    try:
        _settle({}, "interrupted" if isinstance(error, KeyboardInterrupt) else reason)
    except ConfigError as of_all:
        reason = str(of_all)
    return reason


def by_first(call: Callable[[], object], file: Path) -> None:
    """Calls it in the first process, which makes a file by it, and waits until every process sees that file.

    Raises ConfigError in every process where the first one fails or another does not see the file; or as `fail`.
    """
    for step in (call if distributed.is_primary() else lambda: None, lambda: _see(file)):
        try:
            step()
        except BaseException as error:  # noqa: BLE001 (as in `fail`)
            fail(error)
        agree({})


def _see(file: Path) -> None:
    """Raises FileNotFoundError for one that does not appear; file systems over a network may take a while."""
    end = time.monotonic() + _PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(f"{file.parent} is not the first process's; expected a directory that all share")
        time.sleep(0.1)


def tell(error: Exception, arguments: Sequence[str]) -> Exception:
    """The error that a process with this command line ends with, after it has told the others.

    Where it has not joined them yet, it does so first, if the command line or the environment says how. Raises
    SystemExit if it has had to speak before.
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
    """Raises ConfigError, the same in every process, unless all have described the same run."""
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
    """Raises ConfigError, in every process, where processes have unequal numbers of devices: none could gather."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    try:
        check_same([{"devices": counts[number]} for number in range(jax.process_count())])
    except ConfigError as error:
        raise ConfigError(reason or str(error)) from error


def _gather(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every process, in order."""
    data = np.frombuffer(json.dumps(report, default=repr).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32))
    room = -(-int(np.max(sizes)) // _BLOCK) * _BLOCK
    everyone = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]
