"""A recall task as text, "mqar:length=64,pairs=8", and its examples as windows to train on."""

import difflib
import inspect
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int

from osdn_jax.data.recall.arguments import IGNORE
from osdn_jax.data.recall.changes import drifting_mqar, forgetting_mqar
from osdn_jax.data.recall.copying import compression, memorization, selective_copying
from osdn_jax.data.recall.fuzzy import fuzzy_in_context_recall
from osdn_jax.data.recall.in_context import in_context_recall, noisy_in_context_recall
from osdn_jax.data.recall.multi_query import Recall, mqar
from osdn_jax.data.windows import Window

_ALL = (
    mqar,
    forgetting_mqar,
    drifting_mqar,
    selective_copying,
    in_context_recall,
    noisy_in_context_recall,
    fuzzy_in_context_recall,
    memorization,
    compression,
)
TASKS: Mapping[str, Callable[..., Recall]] = MappingProxyType({task.__name__: task for task in _ALL})
"""The generators by name. Each is called as task(examples, length=…, vocabulary=…, …, seed=…)."""


class Task(NamedTuple):
    """A recall task with all its options, as `parse_task` returns it.

    Attributes:
        name: a key of `TASKS`.
        options: the value of every option of the generator; without `examples` and `seed`.
        seed: of the task; every part of the data has its own examples.
    """

    name: str
    options: dict[str, Any]
    seed: int

    @property
    def length(self) -> int:
        """Tokens per example."""
        return int(self.options["length"])

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.options["vocabulary"])

    @property
    def text(self) -> str:
        """The task with every option, also those left at their defaults; `parse_task` reads it."""
        return f"{self.name}:" + ",".join(
            f"{key}={value}" for key, value in (self.options | {"seed": self.seed}).items()
        )

    def generate(self, examples: int, *, part: int = 0) -> Recall:
        """Return examples of one part of the data: 0 for training, 1 for validation; others are free.

        Raises TypeError or ValueError as the generator does.
        """
        return TASKS[self.name](examples, **self.options, seed=(self.seed, part))


def parse_task(text: str, *, length: int | None = None) -> Task:
    """Parse "name:option=value,option=value", the value of `data.task`.

    Args:
        text: the name of a generator of `osdn_jax.data.recall` and its options; `seed=0` is the default seed.
        length: of the examples if neither the text nor the generator has one. Default: None, the text needs one.

    Returns:
        The task, with all options; one example is generated to check them.

    Raises:
        ValueError: an unknown task or option, an option that is missing, given twice, of another type or out of range.

    Example:
        >>> task = parse_task("mqar:length=64,pairs=8")
        >>> task.vocabulary, task.text
        (8192, 'mqar:length=64,pairs=8,vocabulary=8192,power=0.01,random_gaps=True,reads=1,seed=0')
        >>> task.generate(100, part=1).tokens.shape
        (100, 64)
    """
    name, _, rest = text.strip().partition(":")
    if name not in TASKS:
        raise ValueError(f"task: got {name!r}, expected one of {', '.join(TASKS)}{_near(name, TASKS)}")
    known = inspect.signature(TASKS[name], eval_str=True).parameters
    valid = {key: parameter for key, parameter in known.items() if key != "examples"}
    given: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in valid:
            raise ValueError(f"{name}: got the option {key!r}, expected one of {', '.join(valid)}{_near(key, valid)}")
        if not equals or key in given:
            raise ValueError(f"{name}: got {item!r}, expected {key}=VALUE, once")
        given[key] = _value(f"{name}: {key}", value, int if key == "seed" else valid[key].annotation)
    seed = given.pop("seed", 0)
    if length is not None and valid["length"].default is inspect.Parameter.empty:
        given.setdefault("length", length)
    options = {}
    for key, parameter in valid.items():
        if key == "seed":
            continue
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{name}: got {text!r} without {key}, expected {key}=VALUE")
        options[key] = given.get(key, parameter.default)
    if options.get("autoencoder"):
        raise ValueError(f"{name}: autoencoder: got true, expected false: a causal model would repeat its input")
    task = Task(name, options, seed)
    try:
        task.generate(1)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error
    return task


def _near(word: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _value(place: str, text: str, kind: Any) -> Any:
    """Read a value of a type. Raises ValueError."""
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{place}: got {text!r}, expected true or false")
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{place}: got {text!r}, expected {'an integer' if kind is int else 'a number'}") from error


class TaskWindows:
    """Examples of a task as windows, a `WindowSource` for `training_batches` and `validation_batches`.

    A window has the tokens of an example as `inputs`. Where a token is asked, `targets` has it and `weights` is 1;
    elsewhere both are 0. `segment_ids` are 0: an example is one segment.

    Args:
        examples: tokens and targets [N, L], as the generators return them.

    Attributes:
        sequence_length: L.
        questions: the number of targets of weight 1 over all windows.
        most_questions: the most of them in a window.

    Example:
        >>> windows = TaskWindows(mqar(100, length=8, pairs=1, vocabulary=16, random_gaps=False, seed=0))
        >>> len(windows), windows.questions
        (100, 100)
        >>> {name: array.tolist() for name, array in windows[0].items()}  # doctest: +NORMALIZE_WHITESPACE
        {'inputs': [6, 11, 0, 0, 6, 0, 0, 0], 'targets': [0, 0, 0, 0, 11, 0, 0, 0],
         'segment_ids': [0, 0, 0, 0, 0, 0, 0, 0], 'weights': [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]}
    """

    def __init__(self, examples: Recall) -> None:
        self._tokens, self._targets = examples
        self.sequence_length = self._tokens.shape[1]
        counts = _questions(self._targets)
        self.questions, self.most_questions = int(counts.sum()), int(counts.max())

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._tokens)

    def __getitem__(self, index: SupportsIndex) -> Window:
        """Return window `index`, counted from the end if negative. Raises IndexError outside the source."""
        position, count = operator.index(index), len(self)
        if not -count <= position < count:
            raise IndexError(f"window {position} of {count}")
        tokens, targets = self._tokens[position], self._targets[position]
        asked = targets != IGNORE
        return {
            "inputs": tokens,
            "targets": np.where(asked, targets, np.int32(0)),
            "segment_ids": np.zeros_like(tokens),
            "weights": asked.astype(np.float32),
        }

    def __repr__(self) -> str:
        return f"TaskWindows({len(self)} windows of {self.sequence_length}, {self.questions} questions)"


def _questions(targets: Int[np.ndarray, "N L"]) -> Int[np.ndarray, " N"]:
    return np.count_nonzero(targets != IGNORE, axis=1)
