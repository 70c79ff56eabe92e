"""The task of `config.data.task`: what it says about lengths and the vocabulary."""

import copy

from ml_collections import ConfigDict

from osdn_jax.data import load_tokenizer
from osdn_jax.data.recall import Task, parse_task


def configured_tasks(config: ConfigDict) -> tuple[Task, Task] | None:
    """Return the tasks to train and to validate on; None if the run has a text.

    Raises ValueError, naming the key, for a task that cannot be read or does not go with the other keys.
    """
    data = config.data
    text, other = data.get("task"), data.get("validation_task")
    if text is None:
        if other is not None:
            raise ValueError(f"data.validation_task: got {other!r} without data.task, expected None")
        return None
    for key in ("path", "mixture", "validation_path"):
        if data[key]:
            raise ValueError(f"data.task: got {text!r} beside data.{key} = {data[key]!r}; give one of them")
    task = _parsed("task", text, config.sequence_length)
    held_out = task if other is None else _parsed("validation_task", other, task.length)
    size, needed = config.model.vocab_size, max(task.vocabulary, held_out.vocabulary)
    if size is not None and size < needed:
        raise ValueError(f"model.vocab_size: got {size}, expected at least {needed}, the vocabulary of data.task")
    return task, held_out


def with_task(config: ConfigDict) -> ConfigDict:
    """Return a configuration whose sequence lengths are those of its task; the same one if the run has a text.

    Raises ValueError as `configured_tasks`.
    """
    tasks = configured_tasks(config)
    if tasks is None:
        return config
    changed = copy.deepcopy(config)
    changed.sequence_length, changed.validation.sequence_length = (task.length for task in tasks)
    return changed


def vocabulary_size(config: ConfigDict) -> int:
    """Return model.vocab_size, by default the size of the task's vocabulary or else the tokenizer's.

    Raises as `configured_tasks` and `load_tokenizer`.
    """
    tasks = configured_tasks(config)
    if config.model.vocab_size is not None:
        return int(config.model.vocab_size)
    if tasks is not None:
        return max(task.vocabulary for task in tasks)
    return load_tokenizer(config.data.tokenizer).vocab_size


def _parsed(key: str, text: str, length: int) -> Task:
    try:
        return parse_task(text, length=length)
    except ValueError as error:
        raise ValueError(f"data.{key}: {error}") from error
