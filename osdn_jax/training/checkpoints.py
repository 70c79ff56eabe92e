"""Checkpoints of a training run: Orbax's CheckpointManager with Grain's iterator state, robust against damaged files.

A checkpoint is one folder named after its step. Orbax writes it in the background under another name and renames it
when it is complete, so a killed process leaves the earlier checkpoints whole. This module adds:

* a checksum of every array, computed where the array is and compared on reading: TensorStore notices a truncated or
  missing file, but not a flipped bit in an incompressible chunk;
* if the newest checkpoint cannot be read, it is moved aside, not deleted, and the one before it is used. It has to be
  moved because Orbax silently skips a save at or below the newest step that it sees;
* a checkpoint of another model is refused by the names of the arrays that differ;
* a checkpoint has fingerprints of the text and tokenizer that it was trained with, and is refused, by name, if they
  have changed;
* a link or a file that is named like a checkpoint, which Orbax would take for one, is moved aside, and so is a copy of
  a checkpoint under another step's name.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from osdn_jax.training import distributed
from osdn_jax.training.checkpoint_arrays import PyTree, abstract, checksums
from osdn_jax.training.checkpoint_reading import (
    CheckpointError,
    CheckpointMismatchError,
    missing_fingerprints,
    newest_readable,
    one_line,
    open_manager,
    read_checkpoint,
)

if TYPE_CHECKING:
    import grain

__all__ = ["CheckpointError", "CheckpointMismatchError", "Checkpoints", "Restored", "load_parameters"]

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """The result of `Checkpoints.restore`.

    Attributes:
        step: the checkpoint's step.
        state: the pytree, with the target's structure and shardings.
        metadata: the JSON dictionary that was saved with it.
        warnings: one line for each newer checkpoint that could not be read and was moved, for each link that was moved
            aside, and for fingerprints that the checkpoint does not have.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]
    warnings: tuple[str, ...]


class Checkpoints:
    """Saves and restores the checkpoints of one run. Use as a context manager, or call `close`.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from osdn_jax.training import Checkpoints, load_parameters
        >>> folder = tempfile.mkdtemp()
        >>> state = {"params": {"kernel": jnp.ones((2, 3))}, "step": jnp.int32(10)}
        >>> with Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(10, state)
        ...     restored = checkpoints.restore(state)
        >>> restored.step
        10
        >>> step, parameters = load_parameters(folder, state["params"])
        >>> step, parameters["kernel"].shape
        (10, (2, 3))
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_to_keep: int | None = 3,
        keep_period: int | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """Open the folder, creating it if missing; remove what a killed process left unfinished in it.

        Args:
            directory: the folder of the checkpoints, used by one run at a time.
            max_to_keep: number of newest checkpoints to keep; None keeps all.
            keep_period: also keep every checkpoint whose step is a multiple of this.
            fingerprints: {what: fingerprint} of what training depends on in addition to its state, such as the text;
                saved with each checkpoint and compared when one is restored.

        Raises:
            ValueError: max_to_keep or keep_period below 1.
            CheckpointError: a checkpoint is a link to a folder elsewhere.
        """
        from orbax.checkpoint import checkpoint_managers

        for name, value in (("max_to_keep", max_to_keep), ("keep_period", keep_period)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        keep: list[checkpoint_managers.PreservationPolicy] = [checkpoint_managers.LatestN(max_to_keep)]
        if keep_period is not None:
            keep.append(checkpoint_managers.EveryNSteps(keep_period))
        self._directory = Path(directory).absolute()
        self._fingerprints = dict(fingerprints or {})
        self._moved = self._move_impostors_aside()
        self._manager = open_manager(
            self._directory,
            cleanup_tmp_directories=True,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
        )
        self._saving: int | None = None

    def _move_impostors_aside(self) -> list[str]:
        """Call the function of this name in process 0. Its error is raised in every process, so that none waits."""
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
        """The newest step saved or being saved; None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Return the steps of the checkpoints in order, including the one being saved."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: PyTree,
        iterator: "grain.DatasetIterator | None" = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Start saving a checkpoint; wait for the previous save, but not for this one.

        Args:
            step: greater than any step saved.
            state: pytree of jax arrays, typed random keys as their `jax.random.key_data`. It may be donated as soon as
                this returns.
            iterator: the training data's iterator; its current position is saved.
            metadata: a small dictionary that JSON can hold.

        Raises:
            ValueError: the step is not greater than the newest one.
            TypeError: a leaf of the state is no jax array, is empty or is a typed random key; metadata is not JSON.
            CheckpointError: this save could not start, or the previous one failed.
        """
        import grain.checkpoint
        import orbax.checkpoint as ocp

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

    def restore(self, target: PyTree, iterator: "grain.DatasetIterator | None" = None) -> Restored | None:
        """Restore the newest checkpoint that can be read.

        Newer ones that cannot be read are renamed to `<step>.corrupt`, with a warning in the log and in the result.

        Args:
            target: pytree of jax arrays or `jax.ShapeDtypeStruct`s, whose structure, shapes, dtypes and shardings the
                result has (without a sharding: the first device).
            iterator: set to the saved position, in place. Unchanged unless a checkpoint is restored.

        Returns:
            The checkpoint; None if the folder has none.

        Raises:
            CheckpointMismatchError: the checkpoint is of another model or data pipeline, or has other fingerprints.
            CheckpointError: there are checkpoints, but none can be read. Nothing is renamed.
        """
        self.wait()
        target = abstract(target)
        step, found, unreadable = newest_readable(
            self._manager,
            lambda step: read_checkpoint(
                self._manager, self._directory / str(step), target, iterator=iterator, fingerprints=self._fingerprints
            ),
        )
        if step is None or found is None:
            return None
        warnings = [*self._moved, *missing_fingerprints(step, found.record, self._fingerprints)]
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
        """Wait until the current save is complete. Raises CheckpointError if it failed."""
        self._surfacing_errors(self._manager.wait_until_finished)

    def close(self) -> None:
        """Wait as `wait` does and end the background threads."""
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
            log.error("%s", failed)  # the exception being handled matters more

    def _surfacing_errors[T](self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:  # any error of the background thread; TensorStore raises plain ValueErrors
            self._manager.reload()  # the failed step is still in Orbax's list, and the one it was to replace is not
            left = self.latest_step
            kept = (
                "there is no complete checkpoint" if left is None else f"the newest complete checkpoint is step {left}"
            )
            raise CheckpointError(
                f"saving checkpoint {self._saving} in {self._directory} failed; {kept}. {one_line(error)}"
            ) from error


def load_parameters(
    directory: str | os.PathLike[str],
    target: PyTree,
    *,
    key: str = "params",
    step: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> tuple[int, PyTree]:
    """Read only the parameters of a checkpoint. Changes nothing in the folder.

    Args:
        directory: the folder of the checkpoints.
        target: the parameters' pytree, of arrays or `jax.ShapeDtypeStruct`s (as for `Checkpoints.restore`).
        key: their key in the saved state: "params", or "ema" for their moving average.
        step: the checkpoint's step; default: the newest that can be read, with a warning in the log for any newer one.
        fingerprints: those of the checkpoint to compare, as for `Checkpoints`, such as the tokenizer's alone.

    Returns:
        (step, parameters).

    Raises:
        FileNotFoundError: no such folder, no checkpoint in it, or not this step.
        CheckpointMismatchError: they are of another model, or a fingerprint differs.
        CheckpointError: no checkpoint can be read.
    """
    directory = Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder of checkpoints {directory}")
    target = {key: abstract(target)}
    with open_manager(directory, read_only=True) as manager:
        if step is not None and step not in manager.all_steps():
            raise FileNotFoundError(f"no checkpoint {step} in {directory}; there are {sorted(manager.all_steps())}")
        number, found, unreadable = newest_readable(
            manager,
            lambda number: read_checkpoint(
                manager, directory / str(number), target, partial=True, fingerprints=fingerprints
            ),
            only=step,
        )
    if number is None or found is None:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    for bad, reason in unreadable.items():
        log.warning("checkpoint %d cannot be read (%s); using step %d", bad, reason, number)
    for warning in missing_fingerprints(number, found.record, fingerprints):
        log.warning("%s", warning)
    return number, found.state[key]


def _move_impostors_aside(directory: Path) -> list[str]:
    """Rename links and files that have a step's name, because Orbax would count them; return a warning for each.

    Raises CheckpointError for a link to a folder elsewhere: that may be a checkpoint that the user moved.
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
    """Return `<step>.corrupt`, or `.corrupt2` and so on, for `<step>`; Orbax reads none of these names as a step."""
    number = 1
    while os.path.lexists(moved := path.with_name(f"{path.name}.{why}{number if number > 1 else ''}")):
        number += 1
    return moved
