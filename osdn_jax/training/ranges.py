"""The range of each number of a configuration, in one table; no range includes NaN."""

import dataclasses
import math
import numbers
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from osdn_jax.training.config import flatten

_INT32 = 2**31 - 1  # steps and sizes are int32 on the device
_LEAST, _MOST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may have: from `least` to `most`; a float after rounding to float32."""

    kind: type  # int or float
    words: str  # what is expected, for messages
    least: float
    most: float
    below: bool = False  # True excludes `most`
    optional: bool = False  # True accepts None
    message: str = "{key}: got {value!r}, expected {words}"  # for a number outside

    def check(self, key: str, value: Any) -> None:
        """Raise ValueError, naming the key, for a value outside."""
        if value is None and self.optional:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.kind is int else numbers.Real):
            kind = "an int" if self.kind is int else "a number"
            raise ValueError(f"{key}: got {value!r}, expected {kind}, {self.words}{' or None' * self.optional}")
        number: Any = value
        if self.kind is int and number > self.most:
            raise ValueError(f"{key}: got {value!r}, expected at most {self.most}")
        if not self._holds(value):
            raise ValueError(self.message.format(key=key, value=value, words=self.words))
        if self.kind is float and not self._holds(_rounded(value)):
            raise ValueError(f"{key}: got {value!r}, in float32 {_rounded(value)!r}, expected {self.words}")

    def _holds(self, value: Any) -> bool:
        return bool(self.least <= value and (value < self.most if self.below else value <= self.most))


def _rounded(value: Any) -> float:
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(value))


def _count(least: int = 1, *, most: int = _INT32, optional: bool = False, message: str | None = None) -> Range:
    words = f"at least {least}"
    return Range(int, words, least, most, optional=optional, message=message or Range.message)


def _positive(words: str = "more than 0 and finite", most: float = _MOST) -> Range:
    return Range(float, words, _LEAST, most)


_NOT_NEGATIVE = Range(float, "a number of at least 0, finite", 0, _MOST)
_BELOW_ONE = Range(float, "from 0 to below 1", 0, 1, below=True)
_SHARE = Range(float, "from 0 to 1", 0, 1)
_DEVICES = Range(int, "at least 1, or -1 for all devices that are left", -1, _INT32)  # build_mesh refuses 0
# The same messages as those of `osdn_jax.data`.
_BATCH = _count(message="{key} must be {words}; got {value!r}")
_LENGTH = _count(message="{key}: a sequence length must be {words}; got {value!r}")

RANGES: dict[str, Range] = {
    "seed": _count(0, most=2**32 - 1),
    "steps": _count(),
    "batch_size": _BATCH,
    "sequence_length": _LENGTH,
    "accumulate": _count(),
    "ema": _BELOW_ONE,
    "max_skipped_steps": _count(0),
    "log_every": _count(),
    "hang_seconds": _count(0),
    "data.shuffle_windows": _count(),
    # 0 and 1 are accepted if the fraction is not used; if it is, `split_documents` refuses them.
    "data.validation_fraction": Range(
        float, "from 0 to 1", 0, 1, message="{key} must be between 0 and 1, both excluded; got {value!r}"
    ),
    "data.validation_documents": _count(0),  # the same; a stream needs at least 1
    "data.task_examples": _count(),
    "data.validation_examples": _count(),
    "model.vocab_size": _count(optional=True),
    "model.layers": _count(),
    "model.width": _count(),
    "model.heads": _count(),
    "model.key_heads": _count(optional=True),
    "model.key_dim": _count(optional=True),
    "model.value_dim": _count(optional=True),
    "model.mlp_dim": _count(),
    "model.conv_size": _count(),
    "model.dropout": _BELOW_ONE,
    "model.anchor": Range(float, "a finite number", -_MOST, _MOST, optional=True),
    "model.eta": Range(float, "at least 0 and finite", 0, _MOST, optional=True),
    "model.initial": Range(float, "a finite number", -_MOST, _MOST, optional=True),
    "model.forget_constant": Range(float, "above 0 and at most 1", _LEAST, 1),
    "model.squash": Range(float, "more than 0 and finite", _LEAST, _MOST, optional=True),
    "model.fixed_beta": Range(float, "more than 0 and finite", _LEAST, _MOST, optional=True),
    "model.output_gate_rank": _count(optional=True),
    "model.decay_rank": _count(optional=True),
    "model.attention_every": _count(optional=True),
    "model.attention_heads": _count(optional=True),
    "model.attention_key_heads": _count(optional=True),
    "model.rotary_base": Range(float, "more than 1 and finite", math.nextafter(1, 2), _MOST),
    "model.rotary_dim": _count(optional=True),
    "model.window": _count(optional=True),
    "model.max_length": _count(optional=True),
    "model.experts": _count(optional=True),
    "model.active_experts": _count(),
    "model.expert_dim": _count(optional=True),
    "model.shared_expert_dim": _count(0),
    "model.dense_layers": _count(0),
    "model.chunk_size": _count(optional=True),
    "loss.sequence_chunk": _count(),
    "loss.vocabulary_chunk": _count(),
    "loss.balance": _NOT_NEGATIVE,
    "loss.z_loss": _NOT_NEGATIVE,
    "optimizer.learning_rate": _positive(),
    "optimizer.muon_learning_rate": _positive(),
    "optimizer.muon_momentum": _BELOW_ONE,
    "optimizer.warmup_steps": _count(0),
    "optimizer.final_fraction": _SHARE,
    "optimizer.weight_decay": Range(float, "at least 0 and finite", 0, _MOST),
    "optimizer.beta1": _BELOW_ONE,
    "optimizer.beta2": _BELOW_ONE,
    "optimizer.clip_norm": _positive("more than 0; inf clips nothing", most=math.inf),
    "validation.every": _count(),
    "validation.windows": _count(0),
    "validation.batch_size": _BATCH,
    "validation.sequence_length": _LENGTH,
    "checkpoint.every": _count(),
    "checkpoint.keep": _count(),
    "checkpoint.keep_every": _count(optional=True),
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "mesh.tensor": _DEVICES,
    "mesh.context": _DEVICES,
}


def check_ranges(config: ConfigDict, *prefixes: str) -> None:
    """Raise ValueError, naming the key, for a number outside its range.

    Args:
        config: with the keys of `default_config`.
        *prefixes: check only keys that start with one of these, such as "optimizer."; default: all keys.

    Example:
        >>> from osdn_jax.training import check_ranges, default_config
        >>> config = default_config()
        >>> config.ema = 1.0
        >>> check_ranges(config)
        Traceback (most recent call last):
        ValueError: ema: got 1.0, expected from 0 to below 1
    """
    for key, value in flatten(config).items():
        if prefixes and not key.startswith(prefixes):
            continue
        if key in RANGES:
            RANGES[key].check(key, value)
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{key}: got nan, expected a number")
