"""Options of another library's config.json: each is read, required or known to change nothing; others are refused."""

import json
from collections.abc import Collection, Mapping
from typing import Any, overload

from osdn_jax._errors import first_line

# Entries of every library's files that do not change the logits.
_WITHOUT_EFFECT = {
    "model_type",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "_name_or_path",
    "_attn_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "attention_dropout",
    "pretraining_tp",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
}
_MISSING: Any = object()


class Options:
    """The entries of a config.json. The readers collect problems, and `finish` raises one error that lists them all.

    Args:
        config: the entries.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Read nothing yet."""
        self.config = config
        self.problems: list[str] = []
        self._known = set(_WITHOUT_EFFECT)

    def __contains__(self, name: str) -> bool:
        """Return whether the config has an entry that is not null."""
        return self.config.get(name) is not None

    def any(self, name: str, default: Any = None) -> Any:
        """Return an entry of any type, or the default if it is absent or null."""
        self._known.add(name)
        value = self.config.get(name)
        return default if value is None else value

    @overload
    def integer(self, name: str, default: int = ..., *, least: int = 1) -> int: ...
    @overload
    def integer(self, name: str, default: None, *, least: int = 1) -> int | None: ...
    def integer(self, name: str, default: Any = _MISSING, *, least: int = 1) -> Any:
        """Return an integer of at least `least`; an absent or null one is the default, or a problem without one."""
        return self._read(
            name, default, f"an integer of at least {least}", lambda x: type(x) is int and x >= least, least
        )

    @overload
    def number(self, name: str, default: float = ..., *, above: float = 0.0) -> float: ...
    @overload
    def number(self, name: str, default: None, *, above: float = 0.0) -> float | None: ...
    def number(self, name: str, default: Any = _MISSING, *, above: float = 0.0) -> Any:
        """Return a finite number above `above`; an absent or null one is the default, or a problem without one."""

        def fits(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and above < value < float("inf")

        return self._read(name, default, f"a number above {above:g}", fits, above + 1)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean; an absent or null one is the default."""
        return self._read(name, default, "true or false", lambda x: isinstance(x, bool), default)

    def choice(self, name: str, default: str, known: Collection[str]) -> str:
        """Return one of the known words; an absent or null one is the default."""
        return self._read(name, default, f"one of {', '.join(known)}", lambda x: x in known, default)

    def require(self, name: str, *allowed: Any) -> None:
        """Note a problem unless the entry is absent, null or one of the values that this package can serve."""
        value = self.any(name)
        if value is not None and not any(value == other and type(value) is type(other) for other in allowed):
            expected = " or ".join([*(json.dumps(other) for other in allowed), "null"])
            self.problem(name, value, expected)

    def without_effect(self, *names: str) -> None:
        """Know entries that do not change the logits of a model in use."""
        self._known.update(names)

    def problem(self, name: str, value: Any, expected: str) -> None:
        """Note a problem of an entry."""
        self.problems.append(f"{name}: got {_shown(value)}, expected {expected}")

    def finish(self, *, allow: Collection[str] = ()) -> None:
        """Raise ValueError if there are problems, or entries that nothing has read.

        Args:
            allow: names of further entries without effect.
        """
        unknown = [name for name in self.config if name not in self._known and name not in allow]
        for name in unknown:
            self.problems.append(f"{name}: got {_shown(self.config[name])}, which is an unknown option here")
        self.raise_problems()

    def raise_problems(self) -> None:
        """Raise ValueError if there are problems so far."""
        if self.problems:
            raise ValueError("; ".join(["config.json: " + self.problems[0], *self.problems[1:]]))

    def _read(self, name: str, default: Any, expected: str, fits: Any, stand_in: Any) -> Any:
        value = self.any(name, default)
        if value is _MISSING:
            self.problems.append(f"{name}: is missing, expected {expected}")
            return stand_in
        if value is not default and not fits(value):
            self.problem(name, value, expected)
            return stand_in
        return value


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        return first_line(error)
    return text if len(text) <= 80 else text[:77] + "..."
