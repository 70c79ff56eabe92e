"""The layout of this package's own models: the fields of `nn.ModelConfig`, and the parameters by their paths."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from flax import nnx

from osdn_jax.interop.family import Family
from osdn_jax.interop.mapping import Row, same
from osdn_jax.nn import CausalLM, ModelConfig, split_model

MODEL_TYPE = "osdn_jax"
_ENTRIES = {"model_type", "model", "dtype"}
# What another layout said, and a reader of tokens may ask for.
_ENTRIES |= {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range"}


def describe(config: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that `model` holds."""
    unknown = sorted(set(config) - _ENTRIES)
    if unknown or not isinstance(config.get("model"), dict):
        raise ValueError(
            f"config.json: got the entries {', '.join(config)}, expected model_type, dtype and model, the fields of a "
            "ModelConfig"
        )
    try:
        return ModelConfig.from_dict(config["model"])
    except TypeError as error:  # an unknown field, as a later version may write
        raise ValueError(f"config.json: model: {error}") from error


def rows(config: ModelConfig, source: Mapping[str, Any], keys: Collection[str]) -> list[Row]:
    """Return a row for each parameter, which has the same name in the file."""
    _, shapes = split_model(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    return [same(name, name) for name in shapes]


def express(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of config.json."""
    return {"model_type": MODEL_TYPE, "model": dataclasses.asdict(config)}


FAMILY = Family(MODEL_TYPE, "osdn-jax", describe, rows, express=express)
