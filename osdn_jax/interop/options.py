"""Options of another library's config.json: each is read, required or known to change nothing; others are refused."""

import json
from collections.abc import Collection, Mapping
from typing import Any, overload

from osdn_jax._errors import first_line, printable

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
    # Of generation and of training, which versions of Transformers before 5 wrote here.
    "add_cross_attention",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "is_decoder",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "prefix",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "typical_p",
    "use_bfloat16",
    # Without effect once `folder.unserved` has let them pass.
    "auto_map",
    "trust_remote_code",
    "quantization_config",
}
MANY = 10_000
"""The most layers or experts that a config may have; a wrong number would otherwise take all memory."""

LARGEST = 1e38
"""A limit of numbers in a config: float32 has none that are much larger."""

_MISSING: Any = object()


class ConfigProblems(ValueError):
    """The problems of a config.json.

    Attributes:
        problems: a line for each.
    """

    def __init__(self, problems: list[str]) -> None:
        """Join the lines to one message."""
        super().__init__("config.json: " + "; ".join(problems))
        self.problems = problems


class Options:
    """The entries of a config.json. The readers collect problems, and `finish` raises one error that lists them all.

    Args:
        config: the entries.
        place: prefix of the names in messages, such as "text_config.".
    """

    def __init__(self, config: Mapping[str, Any], place: str = "") -> None:
        """Read nothing yet."""
        self.config = config
        self.problems: list[str] = []
        self._place = place
        self._known = set(_WITHOUT_EFFECT)
        self._parent: Options | None = None
        self._sections: list[Options] = []

    def __contains__(self, name: str) -> bool:
        """Return whether the config has an entry that is not null."""
        return self.config.get(name) is not None

    def any(self, name: str, default: Any = None) -> Any:
        """Return an entry of any type, or the default if it is absent or null."""
        self._known.add(name)
        value = self.config.get(name)
        return default if value is None else value

    @overload
    def integer(self, name: str, default: int = ..., *, least: int = 1, most: int = ...) -> int: ...
    @overload
    def integer(self, name: str, default: None, *, least: int = 1, most: int = ...) -> int | None: ...
    def integer(self, name: str, default: Any = _MISSING, *, least: int = 1, most: int = 2**31 - 1) -> Any:
        """Return an integer from least to most; an absent or null one is the default, or a problem without one."""
        expected = f"an integer of at least {least}" if most > MANY else f"an integer from {least} to {most:,}"
        return self._read(name, default, expected, lambda x: type(x) is int and least <= x <= most, least)

    @overload
    def number(self, name: str, default: float = ..., *, above: float = ..., below: float = ...) -> float: ...
    @overload
    def number(self, name: str, default: None, *, above: float = ..., below: float = ...) -> float | None: ...
    def number(self, name: str, default: Any = _MISSING, *, above: float = 0.0, below: float = LARGEST) -> Any:
        """Return a number between two that float32 has; an absent or null one is the default, or a problem without one.

        Args:
            name: the entry.
            default: the default.
            above: the number is above it. Default: 0; `-LARGEST` for any number.
            below: the number is below it. Default: `LARGEST`.
        """

        def fits(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and above < value < below

        limits = [f"above {above:g}"] * (above > -LARGEST) + [f"below {below:g}"] * (below < LARGEST)
        expected = " ".join(["a number", *(" and ".join(limits),) * bool(limits)])
        stand_in = default if isinstance(default, int | float) else above + 1 if above > -LARGEST else below - 1
        value = self._read(name, default, expected, fits, stand_in)
        return None if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean; an absent or null one is the default."""
        return self._read(name, default, "true or false", lambda x: isinstance(x, bool), default)

    def choice(self, name: str, default: str, known: Collection[str]) -> str:
        """Return one of the known words; an absent or null one is the default."""
        return self._read(
            name, default, f"one of {', '.join(known)}", lambda x: isinstance(x, str) and x in known, default
        )

    def name_of(self, *names: str) -> str:
        """Return the name under which the config has an entry, of several for the same option; without one, the first.

        A problem is noted if two of them differ.
        """
        self._known.update(names)
        found = [name for name in names if name in self]
        for other in found[1:]:
            if self.config[other] != self.config[found[0]]:
                self.problem(other, self.config[other], f"{shown(self.config[found[0]])}, as {found[0]} says")
        return found[0] if found else names[0]

    def section(self, name: str) -> "Options":
        """Return the options of an entry that is an object; it is empty if the entry is absent or null."""
        value = self.any(name, {})
        if not isinstance(value, dict):
            self.problem(name, value, "an object")
            value = {}
        section = Options(value, f"{self._place}{name}.")
        section.problems, section._parent = self.problems, self
        self._sections.append(section)
        return section

    def words(self, name: str, count: int, known: Collection[str]) -> list[str] | None:
        """Return a list of `count` words, each one of the known ones; None if it is absent or null."""
        value = self.any(name)
        if value is None:
            return None
        if (
            not isinstance(value, list)
            or len(value) != count
            or any(not isinstance(word, str) or word not in known for word in value)
        ):
            self.problem(name, value, f"a list of {count} of {', '.join(known)}")
            return None
        return value

    def indices(self, name: str, count: int, first: int = 0) -> list[int]:
        """Return a list of numbers of layers, counted from `first`, of `count` layers; empty if absent or null."""
        value = self.any(name, [])
        if not isinstance(value, list) or any(type(i) is not int or not 0 <= i - first < count for i in value):
            self.problem(name, value, f"a list of numbers from {first} to {first + count - 1}")
            return []
        return [i - first for i in value]

    def divisor(self, name: str, value: int, of: str, total: int) -> None:
        """Note a problem unless the value of an option divides that of another."""
        if total % value:
            self.problem(name, value, f"a divisor of {of}, {total}")

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
        """Note a problem of an entry, which is shown as the config has it, or else as the value."""
        got = shown(self.config.get(name, value))
        self.problems.append(f"{self._place}{printable(name)}: got {got}, expected {expected}")

    def finish(self) -> None:
        """Raise ValueError if the config, of which this may be a section, has problems or entries that nothing read."""
        if self._parent is not None:
            self._parent.finish()
            return
        self._note_unknown()
        if self.problems:
            raise ConfigProblems(self.problems)

    def _note_unknown(self) -> None:
        for name in self.config:
            if name not in self._known and not name.startswith("_"):
                got = shown(self.config[name])
                self.problems.append(f"{self._place}{printable(name)}: got {got}, an option unknown here")
        for section in self._sections:
            section._note_unknown()

    def _read(self, name: str, default: Any, expected: str, fits: Any, stand_in: Any) -> Any:
        value = self.any(name, default)
        if value is _MISSING:
            self.problems.append(f"{self._place}{name}: is missing, expected {expected}")
            return stand_in
        if value is not default and not fits(value):
            self.problem(name, value, expected)
            return stand_in
        return value


def shown(value: Any) -> str:
    """Return a value of a config for an error: as JSON, shortened."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        return first_line(error)
    return text if len(text) <= 80 else text[:77] + "..."
