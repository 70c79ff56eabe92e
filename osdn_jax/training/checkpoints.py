"""Checkpoints of a training run: orbax's CheckpointManager, with grain's iterator state and a way out of damaged files.

A checkpoint is one folder named after its step. Orbax writes it in the background under another name and renames it
when it is complete, so a killed process leaves the checkpoints before it whole. Five things are added here:

* a checksum of every array, computed where the array lives and compared on reading. TensorStore notices a truncated or
  missing file, but not a flipped bit in an uncompressible chunk;
* a newest checkpoint that cannot be read is moved aside, not deleted, and the one before it is used. It has to move:
  orbax quietly skips a save at or below the newest step it sees;
* a checkpoint of another model is refused by the names of the arrays that differ;
* a checkpoint has fingerprints of the text and tokenizer that it was trained with, and is refused, by name, where they
  have changed;
* a link or a file that is named like a checkpoint, which orbax would take for one, is moved aside, and so is a copy of
  a checkpoint under another step's name.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import grain
import grain.checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from osdn_jax._errors import first_line
from osdn_jax.training import distributed
from osdn_jax.training.checkpoint_arrays import abstract, checksums, leaves

log = logging.getLogger(__name__)

type PyTree = Any


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, or none could be read."""


class CheckpointMismatchError(ValueError):
    """A checkpoint is of another model (or optimiser, data pipeline, text or tokenizer) than it is restored into."""


class _UnreadableError(Exception):
    """A checkpoint's files are damaged; the message says how, in one line."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` found.

    Attributes:
      step: the checkpoint's step.
      state: the pytree, of the target's structure and shardings.
      metadata: the JSON dictionary that was saved with it.
      warnings: one line for each newer checkpoint that could not be read, and where it is now; for each link that was
        moved aside; and where the checkpoint has no fingerprints to compare.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]
    warnings: tuple[str, ...]


class Checkpoints:
    """Saves and restores the checkpoints of one run. Use as a context manager, or call `close`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = 3,
        keep_period: int | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """Opens the folder, creating it if need be; removes what a killed process left unfinished in it.

        Args:
          directory: the folder of the checkpoints, used by one run at a time.
          max_to_keep: how many of the newest to keep; None keeps all.
          keep_period: also keep every checkpoint whose step is a multiple of this.
          fingerprints: {what: fingerprint} of what training depends on besides its state, such as the text; saved with
            each checkpoint and compared when one is restored.

        Raises:
          ValueError: max_to_keep or keep_period below 1.
          CheckpointError: a checkpoint is a link to a folder elsewhere.
        """
        for name, value in (("max_to_keep", max_to_keep), ("keep_period", keep_period)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        keep: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(max_to_keep)]
        if keep_period is not None:
            keep.append(checkpoint_managers.EveryNSteps(keep_period))
        self._directory = Path(directory).absolute()
        self._fingerprints = dict(fingerprints or {})
        self._moved = self._move_impostors_aside()
        self._manager = _manager(
            self._directory,
            cleanup_tmp_directories=True,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
        )
        self._saving: int | None = None

    def _move_impostors_aside(self) -> list[str]:
        """As the function of that name, in the first process. Raises its error in every process, so that none waits."""
        warnings: list[str] = []
        failed: CheckpointError | OSError | None = None
        try:
            if distributed.is_primary():
                warnings = _move_impostors_aside(self._directory)
        except (CheckpointError, OSError) as error:
            failed = error
        if not distributed.all_processes(failed is None):
            raise failed or CheckpointError(f"process 0 cannot use {self._directory}; its own message says why")
        for warning in warnings:
            log.warning("%s", warning)
        return warnings

    @property
    def latest_step(self) -> int | None:
        """The newest step saved, or being saved; None without any."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The steps of the checkpoints, in order, the one being saved included."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: PyTree,
        iterator: grain.DatasetIterator | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Starts saving a checkpoint; waits for the save before it, but not for this one.

        Args:
          step: greater than any step saved.
          state: pytree of jax arrays, typed random keys as their `jax.random.key_data`. It may be donated as soon as
            this returns.
          iterator: the training data's iterator, saved as it stands now.
          metadata: anything small that JSON can hold.

        Raises:
          ValueError: the step is not greater than the newest one.
          TypeError: a leaf of the state is no jax array, is empty or is a typed random key; metadata is not JSON.
          CheckpointError: this save could not start, or the one before it failed.
        """
        self.wait()
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise ValueError(f"cannot save step {step}: {self._directory} already holds step {latest}")
        record = {"metadata": metadata or {}, "checksums": checksums(state), "step": step}
        if self._fingerprints:
            record["fingerprints"] = self._fingerprints
        json.dumps(record)  # a TypeError here is better than one from the background thread
        items = {"state": ocp.args.PyTreeSave(state), "metadata": ocp.args.JsonSave(record)}
        if iterator is not None:
            items["data"] = grain.checkpoint.CheckpointSave(iterator)
        self._saving = step
        saved = self._surfacing_errors(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))
        if not saved:
            raise CheckpointError(f"orbax refused to save step {step} in {self._directory}")

    def restore(self, target: PyTree, iterator: grain.DatasetIterator | None = None) -> Restored | None:
        """Restores the newest checkpoint that can be read; None if the folder holds none.

        Newer ones that cannot be read are renamed to `<step>.corrupt`, with a warning in the log and in the result.

        Args:
          target: pytree of jax arrays or `jax.ShapeDtypeStruct`s, whose structure, shapes, dtypes and shardings the
            result has (without a sharding: the first device).
          iterator: set to the saved position, in place. Untouched unless a checkpoint is restored.

        Raises:
          CheckpointMismatchError: the checkpoint is of another model or data pipeline, or has other fingerprints.
          CheckpointError: there are checkpoints, but none can be read. Nothing is renamed.
        """
        self.wait()
        target = abstract(target)
        step, found, unreadable = _newest_readable(
            self._manager,
            lambda step: _read(
                self._manager, self._directory / str(step), target, iterator=iterator, fingerprints=self._fingerprints
            ),
        )
        if step is None or found is None:
            return None
        warnings = [*self._moved, *_without_fingerprints(step, found.record, self._fingerprints)]
        self._moved = []
        distributed.barrier("read")  # before anything is moved
        for bad, reason in unreadable.items():
            moved = _name_aside(self._directory / str(bad))
            distributed.barrier("named")
            if distributed.is_primary():
                (self._directory / str(bad)).rename(moved)
            warnings.append(f"checkpoint {bad} cannot be read ({reason}); it is now {moved.name}; using step {step}")
            log.warning("%s", warnings[-1])
        if unreadable:
            distributed.barrier("moved")
            self._manager.reload()
        return Restored(step, found.state, found.record.get("metadata", {}), tuple(warnings))

    def wait(self) -> None:
        """Waits until the save under way is complete. Raises CheckpointError if it failed."""
        self._surfacing_errors(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits as `wait` does and ends the background threads."""
        self._surfacing_errors(self._manager.close)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if kind is None:
                raise
            log.error("%s", failed)  # the exception under way matters more

    def _surfacing_errors[T](self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:  # whatever the background thread met; TensorStore raises plain ValueErrors
            self._manager.reload()  # the failed step is still in orbax's list, and what it was to replace is not
            left = self.latest_step
            kept = (
                "there is no complete checkpoint" if left is None else f"the newest complete checkpoint is step {left}"
            )
            raise CheckpointError(
                f"saving checkpoint {self._saving} in {self._directory} failed; {kept}. {_one_line(error)}"
            ) from error


def load_parameters(
    directory: str | os.PathLike[str],
    target: PyTree,
    *,
    key: str = "params",
    step: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> tuple[int, PyTree]:
    """Reads only the parameters of a checkpoint. Changes nothing in the folder.

    Args:
      directory: the folder of the checkpoints.
      target: the parameters' pytree, of arrays or `jax.ShapeDtypeStruct`s (as for `Checkpoints.restore`).
      key: where in the saved state they are.
      step: which checkpoint; None is the newest that can be read, with a warning in the log for any newer one.
      fingerprints: those of the checkpoint to compare, as for `Checkpoints`, such as the tokenizer's alone.

    Returns:
      (step, parameters).

    Raises:
      FileNotFoundError: no such folder, no checkpoint in it, or not this step.
      CheckpointMismatchError: they are of another model, or a fingerprint is another.
      CheckpointError: no checkpoint can be read.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder of checkpoints {directory}")
    target = {key: abstract(target)}
    with _manager(directory, read_only=True) as manager:
        if step is not None and step not in manager.all_steps():
            raise FileNotFoundError(f"no checkpoint {step} in {directory}; there are {sorted(manager.all_steps())}")
        number, found, unreadable = _newest_readable(
            manager,
            lambda number: _read(manager, directory / str(number), target, partial=True, fingerprints=fingerprints),
            only=step,
        )
    if number is None or found is None:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    for bad, reason in unreadable.items():
        log.warning("checkpoint %d cannot be read (%s); using step %d", bad, reason, number)
    for warning in _without_fingerprints(number, found.record, fingerprints):
        log.warning("%s", warning)
    return number, found.state[key]


# Reading


def _manager(directory: Path, **options: Any) -> ocp.CheckpointManager:
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


class _Found(NamedTuple):
    """One checkpoint: the state, and the record that was saved beside it."""

    state: PyTree
    record: dict[str, Any]


def _newest_readable(
    manager: ocp.CheckpointManager, read: Callable[[int], _Found], only: int | None = None
) -> tuple[int | None, _Found | None, dict[int, str]]:
    """(step, what is there, {unreadable newer step: why}); step None if there are none. Raises CheckpointError."""
    unreadable: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True) if only is None else [only]:
        found, fault = None, ""
        try:
            found = read(step)
        except _UnreadableError as error:
            fault = str(error)
        if distributed.all_processes(found is not None) and found is not None:
            return step, found, unreadable
        unreadable[step] = fault or "another process cannot read it"
    if unreadable:
        reasons = "".join(f"\n  {step}: {reason}" for step, reason in unreadable.items())
        raise CheckpointError(f"no checkpoint in {manager.directory} can be read:{reasons}")
    return None, None, {}


def _read(
    manager: ocp.CheckpointManager,
    folder: Path,
    target: PyTree,
    *,
    iterator: grain.DatasetIterator | None = None,
    partial: bool = False,
    fingerprints: Mapping[str, str] | None = None,
) -> _Found:
    """One checkpoint. Raises _UnreadableError or CheckpointMismatchError."""
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
                f"{folder} was saved with another data pipeline: {_one_line(error)}"
            ) from error
    return _Found(state, record)


def _reading[T](call: Callable[[], T]) -> T:
    """Calls a read of orbax; what damaged files make it raise (down to a plain Exception) becomes _UnreadableError."""
    try:
        return call()
    except (MemoryError, PermissionError, RuntimeError):
        raise  # out of memory on the device, say: no fault of the files
    except Exception as error:
        raise _UnreadableError(_one_line(error)) from error


def _iterator_state(folder: Path) -> dict[str, Any]:
    """This process's, or where as many other processes saved it, theirs if it is the same for all."""
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
    own = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    if own in states:
        return states[own]
    first, *others = states.values()
    if any(state != first for state in others):
        raise CheckpointMismatchError(
            f"{folder} was saved by {len(states)} processes whose data iterators are at different places; "
            f"got {jax.process_count()} processes, expected as many"
        )
    return first


def _check_same_arrays(saved: PyTree, target: PyTree, folder: Path, *, partial: bool, show: int = 5) -> None:
    """Raises CheckpointMismatchError naming the first arrays whose path, shape or dtype differs."""
    there, here = ({p: f"{np.dtype(x.dtype)}{list(x.shape)}" for p, x in leaves(tree)} for tree in (saved, target))
    paths = list(here) if partial else [*here, *(path for path in there if path not in here)]
    differ = [
        f"\n  {path}: {there.get(path, 'absent')} in the checkpoint, {here.get(path, 'absent')} expected"
        for path in paths
        if there.get(path) != here.get(path)
    ]
    if differ:
        more = f"\n  and {len(differ) - show} more" if len(differ) > show else ""
        raise CheckpointMismatchError(
            f"{folder} is of another model ({len(differ)} of {len(paths)} arrays differ):{''.join(differ[:show])}{more}"
        )


def _check_same_fingerprints(record: Mapping[str, Any], here: Mapping[str, str] | None, folder: Path) -> None:
    """Raises CheckpointMismatchError naming what has another fingerprint than the checkpoint has of it."""
    there = record.get("fingerprints", {})
    differ = [name for name, value in (here or {}).items() if there.get(name, value) != value]
    if differ and here:
        values = ", ".join(f"{name} {there[name][:12]} there, {here[name][:12]} now" for name in differ)
        raise CheckpointMismatchError(
            f"{folder} was trained with another {' and another '.join(differ)} ({values}); "
            "put back what it was trained with, or start a run in another directory"
        )


def _without_fingerprints(step: int, record: Mapping[str, Any], here: Mapping[str, str] | None) -> list[str]:
    """Warns where the checkpoint has no fingerprints to compare with, because an earlier version saved it."""
    missing = [name for name in here or {} if name not in record.get("fingerprints", {})]
    if not missing:
        return []
    return [f"checkpoint {step} has no fingerprint of its {' and '.join(missing)}: taken to be the same as now"]


def _move_impostors_aside(directory: Path) -> list[str]:
    """Renames links and files that have a step's name, as orbax would count them; returns a warning for each.

    Raises CheckpointError for a link to a folder elsewhere: that may be a checkpoint that somebody moved.
    """
    warnings = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not path.name.isdecimal() or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_dir() and directory.resolve() not in path.resolve().parents:
            raise CheckpointError(f"{path} is a link to {path.resolve()}; put the folder itself there, or remove it")
        moved = _name_aside(path, "link" if path.is_symlink() else "file")
        path.rename(moved)
        warnings.append(f"{path} is no checkpoint but a link or a file; it is now {moved.name}")
    return warnings


def _name_aside(path: Path, why: str = "corrupt") -> Path:
    """`<step>.corrupt`, or `.corrupt2` and so on, for `<step>`; orbax reads none of these names as a step."""
    number = 1
    while os.path.lexists(moved := path.with_name(f"{path.name}.{why}{number if number > 1 else ''}")):
        number += 1
    return moved


# Words


def _one_line(error: BaseException, length: int = 240) -> str:
    """The first line of an error's first cause; its middle left out if it is long (TensorStore's end with why)."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = first_line(error) if str(error).strip() else ""
    if len(text) > length:
        text = f"{text[: length // 2]} … {text[-length // 2 :]}"
    return f"{type(error).__name__}: {text}"


def _from_elsewhere(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _silence_orbax() -> None:
    """Keeps orbax's log off the terminal: it prints a traceback up to four times, and raises each error besides."""
    logging.getLogger("absl").addFilter(_from_elsewhere)  # adding the same filter twice is no change
