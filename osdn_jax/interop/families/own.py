"""The layout of this package's own models: the fields of `nn.ModelConfig`, and the parameters by their paths."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from flax import nnx

from osdn_jax._errors import escaped, printable
from osdn_jax.interop.family import Family
from osdn_jax.interop.mapping import Row, same
from osdn_jax.interop.options import LARGEST, MANY, ConfigProblems, shown
from osdn_jax.nn import CausalLM, ModelConfig, split_model

MODEL_TYPE = "osdn_jax"
_LARGEST_SIZE = 2**31 - 1
_ENTRIES = {"model_type", "model", "dtype"}
# What another layout said, and a reader of tokens may ask for.
_ENTRIES |= {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range"}


def describe(config: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that `model` holds."""
    if set(config) - _ENTRIES or not isinstance(config.get("model"), dict):
        names = ", ".join(map(printable, config))
        raise ValueError(
            f"config.json: got the entries {names}, expected model_type, dtype and model, the fields of a ModelConfig"
        )
    problems = list(_out_of_range(config["model"], "model"))
    if problems:
        raise ConfigProblems(problems)
    try:
        return ModelConfig.from_dict(config["model"])
    except (TypeError, ValueError) as error:  # such as an unknown field, as a later version may write
        raise ValueError(f"config.json: model: {escaped(str(error))}") from error


def _out_of_range(value: Any, place: str) -> Iterator[str]:
    """Yield a line for each number below `value` that no model has, or that would take all memory."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _out_of_range(inner, f"{place}.{printable(name)}")
        return
    if isinstance(value, list):
        for i, inner in enumerate(value[:MANY]):
            yield from _out_of_range(inner, f"{place}[{i}]")
        value = len(value)
    counted = place.endswith((".layers", ".blocks", ".experts"))
    if isinstance(value, int) and abs(value) > (MANY if counted else _LARGEST_SIZE):
        yield f"{place}: got {shown(value)}, expected at most {MANY if counted else _LARGEST_SIZE:,}"
    elif isinstance(value, float) and not abs(value) < LARGEST:
        yield f"{place}: got {shown(value)}, expected a number that float32 has"


def rows(config: ModelConfig, source: Mapping[str, Any], keys: Collection[str]) -> list[Row]:
    """Return a row for each parameter, which has the same name in the file."""
    _, shapes = split_model(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    return [same(name, name) for name in shapes]


def express(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of config.json."""
    return {"model_type": MODEL_TYPE, "model": dataclasses.asdict(config)}


FAMILY = Family(MODEL_TYPE, "osdn-jax", describe, rows, express=express)
