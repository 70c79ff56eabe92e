"""Fingerprints of models, by which a state that was saved with another model is refused."""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

# Fields of configurations that change no state: how it is computed, and how much of it is kept.
_NEUTRAL = {"max_length", "remat", "chunk_size", "implementation", "dropout"}
_SMALL = 1 << 14  # elements; of larger parameters this number is compared, evenly spaced


class Fingerprint(NamedTuple):
    """Hashes in hexadecimal that tell models apart.

    Attributes:
        config: of the model's configuration; "" for a model without one.
        shapes: of the names, shapes and dtypes of the parameters.
        weights: of the values of its parameters, of large ones of evenly spaced elements.
    """

    config: str
    shapes: str
    weights: str


def fingerprint(config: Any, parameters: dict[str, Any]) -> Fingerprint:
    """Return the fingerprint of a model.

    Args:
        config: its `ModelConfig`, or None.
        parameters: its parameters.
    """
    shapes = {name: [list(x.shape), str(x.dtype)] for name, x in sorted(parameters.items())}
    weights = hashlib.sha256()
    for name, x in sorted(parameters.items()):
        sample = x.reshape(-1)[:: max(1, x.size // _SMALL)]
        weights.update(name.encode() + np.asarray(sample).tobytes())
    of_config = "" if config is None else _hash(_without_neutral(dataclasses.asdict(config)))
    return Fingerprint(of_config, _hash(shapes), weights.hexdigest())


def _without_neutral(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_neutral(x) for name, x in value.items() if name not in _NEUTRAL}
    return [_without_neutral(x) for x in value] if isinstance(value, (list, tuple)) else value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
