"""Reading one checkpoint: its record, arrays and data position, each compared with what is expected.

Everything that damaged files make Orbax raise becomes one exception, and everything else that differs is named. Orbax
and grain, which take 0.3 s to import, are imported by the functions that call them.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from osdn_jax._errors import first_line
from osdn_jax.training import distributed
from osdn_jax.training.checkpoint_arrays import PyTree, checksums, leaves
from osdn_jax.training.finishing_loop import finishing_loops

if TYPE_CHECKING:
    import grain
    import orbax.checkpoint as ocp


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or none could be read."""


class CheckpointMismatchError(ValueError):
    """A checkpoint is of another model, optimiser, data pipeline, text or tokenizer than the run that restores it."""


class _UnreadableError(Exception):
    """The files of a checkpoint are damaged; the message says how, in one line."""


class Found(NamedTuple):
    """One checkpoint: the state, and the record that was saved with it."""

    state: PyTree
    record: dict[str, Any]


def open_manager(directory: Path, **options: Any) -> "ocp.CheckpointManager":
    """Open a folder of checkpoints with Orbax."""
    import grain.checkpoint
    import orbax.checkpoint as ocp

    _silence_orbax()
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(**options),
        item_handlers={
            "state": ocp.PyTreeCheckpointHandler(),
            "metadata": ocp.JsonCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
        },
    )


def newest_readable(
    manager: "ocp.CheckpointManager", read: Callable[[int], Found], only: int | None = None
) -> tuple[int | None, Found | None, dict[int, str]]:
    """Read the newest checkpoint that every process can read.

    The run that the folder belongs to may be training, and may remove a checkpoint while it is read: if none can be
    read, those that were saved in the meantime are tried.

    Args:
        manager: of the folder.
        read: reads the checkpoint of a step, as `read_checkpoint`.
        only: try this step alone; default: all, from the newest.

    Returns:
        (step, checkpoint, {unreadable newer step: reason}); step and checkpoint are None if the folder has none.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
    """
    unreadable: dict[int, str] = {}
    steps = sorted(manager.all_steps(), reverse=True) if only is None else [only]
    while steps:
        step, found, fault = steps.pop(0), None, ""
        try:
            found = read(step)
        except _UnreadableError as error:
            fault = str(error)
        if distributed.all_processes(found is not None) and found is not None:
            return step, found, {bad: reason for bad, reason in unreadable.items() if bad > step}
        unreadable[step] = fault or "another process cannot read it"
        if not steps and only is None:
            manager.reload()
            steps = sorted(set(manager.all_steps()) - set(unreadable), reverse=True)
            if not distributed.all_processes(bool(steps)):
                break
    if unreadable:
        reasons = "".join(f"\n  {step}: {reason}" for step, reason in unreadable.items())
        raise CheckpointError(f"no checkpoint in {manager.directory} can be read:{reasons}")
    return None, None, {}


def read_checkpoint(
    manager: "ocp.CheckpointManager",
    folder: Path,
    target: PyTree,
    *,
    iterator: "grain.DatasetIterator | None" = None,
    partial: bool = False,
    fingerprints: Mapping[str, str] | None = None,
) -> Found:
    """Read one checkpoint.

    Args:
        manager: of the folder that has it.
        folder: of the checkpoint, named after its step.
        target: tree of `jax.ShapeDtypeStruct`s with shardings.
        iterator: set to the saved position, in place.
        partial: True reads only the arrays of `target`; False requires that there are no others.
        fingerprints: {what: fingerprint} to compare with those of the checkpoint.

    Raises:
        _UnreadableError: its files are damaged.
        CheckpointMismatchError: it is of another model, data pipeline, text or tokenizer.
    """
    import orbax.checkpoint as ocp

    step = int(folder.name)
    alone = ocp.args.Composite(metadata=ocp.args.JsonRestore())
    record = _reading(lambda: manager.restore(step, args=alone)).metadata
    if not isinstance(record, dict) or not all(
        isinstance(record.get(name, {}), dict) for name in ("metadata", "checksums", "fingerprints")
    ):
        raise _UnreadableError("the record beside its arrays is missing or damaged")
    if record.get("step", step) != step:
        raise _UnreadableError(f"it is a copy of checkpoint {record['step']}")
    _check_same_fingerprints(record, fingerprints, folder)
    saved = _reading(lambda: manager.item_metadata(step).state)
    if saved is None:
        raise _UnreadableError("the description of its arrays is missing")
    _check_same_arrays(saved.tree, target, folder, partial=partial)
    arrays = ocp.args.PyTreeRestore(
        item=target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=partial,
    )
    position = None if iterator is None else _iterator_state(folder)
    state = _reading(lambda: manager.restore(step, args=ocp.args.Composite(state=arrays))).state
    saved_checksums = record.get("checksums", {})
    for path, checksum in checksums(state).items():
        if saved_checksums.get(path) != checksum:
            raise _UnreadableError(f"the content of {path} is not what was saved")
    if iterator is not None:  # last, so that it keeps its position if the arrays cannot be read
        try:
            iterator.set_state(position)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointMismatchError(
                f"{folder} was saved with another data pipeline: {one_line(error)}"
            ) from error
    return Found(state, record)


def missing_fingerprints(step: int, record: Mapping[str, Any], expected: Mapping[str, str] | None) -> list[str]:
    """Return a warning if an earlier version saved the checkpoint without the fingerprints that are expected."""
    missing = [name for name in expected or {} if name not in record.get("fingerprints", {})]
    if not missing:
        return []
    return [f"checkpoint {step} has no fingerprint of its {' and '.join(missing)}: taken to be the same as now"]


def one_line(error: BaseException, length: int = 240) -> str:
    """Return the first line of an error's first cause, without its middle if it is long (the reason is at the end)."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = first_line(error) if str(error).strip() else ""
    if len(text) > length:
        text = f"{text[: length // 2]} … {text[-length // 2 :]}"
    return f"{type(error).__name__}: {text}"


def _reading[T](call: Callable[[], T]) -> T:
    """Call a read of Orbax; what damaged files make it raise (even a plain Exception) is _UnreadableError."""
    try:
        with finishing_loops():
            return call()
    except (MemoryError, PermissionError, RuntimeError):
        raise  # such as out of memory on the device: not the files' fault
    except Exception as error:
        raise _UnreadableError(one_line(error)) from error


def _iterator_state(folder: Path) -> dict[str, Any]:
    """Return this process's iterator state, or that of another number of processes if all saved the same."""
    files = sorted((folder / "data").glob("process_*-of-*.json"))
    if not files and not (folder / "data").is_dir():
        raise CheckpointMismatchError(f"{folder} was saved without the state of a data iterator")
    if not files:
        raise _UnreadableError("the state of the data iterator is missing")
    states = {}
    for file in files:
        try:
            states[file.name] = json.loads(file.read_text())
        except ValueError as error:
            raise _UnreadableError(f"the state of the data iterator is damaged: {error}") from error
    this_process = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    if this_process in states:
        return states[this_process]
    first, *others = states.values()
    if any(state != first for state in others):
        raise CheckpointMismatchError(
            f"{folder} was saved by {len(states)} processes whose data iterators are at different places; "
            f"got {jax.process_count()} processes, expected as many"
        )
    return first


def _check_same_arrays(saved: PyTree, target: PyTree, folder: Path, *, partial: bool, show: int = 5) -> None:
    """Raise CheckpointMismatchError, naming the first arrays whose path, shape or dtype differs."""
    found, expected = ({p: f"{np.dtype(x.dtype)}{list(x.shape)}" for p, x in leaves(tree)} for tree in (saved, target))
    paths = list(expected) if partial else [*expected, *(path for path in found if path not in expected)]
    differ = [
        f"\n  {path}: {found.get(path, 'absent')} in the checkpoint, {expected.get(path, 'absent')} expected"
        for path in paths
        if found.get(path) != expected.get(path)
    ]
    if differ:
        more = f"\n  and {len(differ) - show} more" if len(differ) > show else ""
        raise CheckpointMismatchError(
            f"{folder} is of another model ({len(differ)} of {len(paths)} arrays differ):{''.join(differ[:show])}{more}"
        )


def _check_same_fingerprints(record: Mapping[str, Any], expected: Mapping[str, str] | None, folder: Path) -> None:
    """Raise CheckpointMismatchError, naming what has another fingerprint than in the checkpoint."""
    saved = record.get("fingerprints", {})
    differ = [name for name, value in (expected or {}).items() if saved.get(name, value) != value]
    if differ and expected:
        values = ", ".join(f"{name} {saved[name][:12]} there, {expected[name][:12]} now" for name in differ)
        raise CheckpointMismatchError(
            f"{folder} was trained with another {' and another '.join(differ)} ({values}); "
            "put back what it was trained with, or start a run in another directory"
        )


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _silence_orbax() -> None:
    """Keep Orbax's log off the terminal: it prints a traceback up to four times and raises each error as well."""
    logging.getLogger("absl").addFilter(_not_from_orbax)  # adding the same filter twice changes nothing
