"""The families of models that can be loaded, by their model_type."""

from collections.abc import Mapping
from typing import Any

from osdn_jax.interop.families import fla, kimi_linear, olmo_hybrid, osdn, own, qwen3
from osdn_jax.interop.family import Family
from osdn_jax.interop.options import ConfigProblems
from osdn_jax.nn import ModelConfig

_ALL = (
    qwen3.QWEN3_NEXT,
    qwen3.QWEN3_5,
    qwen3.QWEN3_5_MOE,
    olmo_hybrid.FAMILY,
    kimi_linear.FAMILY,
    fla.DELTA_NET,
    fla.GATED_DELTANET,
    fla.KDA,
    fla.PRECOND_GATED_DELTANET,
    fla.PRECOND_KDA,
    osdn.OSLA_DELTA_NET,
    osdn.OS_GATED_DELTANET,
    osdn.OS_KDA,
    own.FAMILY,
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""{name: family}, the layouts that can be read and written."""

MODEL_TYPES: dict[str, Family] = {kind: family for family in FAMILIES.values() for kind in family.types}
"""{model_type of a config.json: its family}."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json.

    Raises:
        ValueError: model_type is absent or of no family.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(f"config.json: model_type: got {kind!r}, expected one of {', '.join(MODEL_TYPES)}")
    return MODEL_TYPES[kind]


def describe(family: Family, config: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of a family's model.

    Raises:
        ValueError: config.json has problems; the message says so first, also where a configuration refuses a value.
    """
    try:
        return family.describe(config)
    except ConfigProblems:
        raise
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.json: {str(error).removeprefix('config.json: ')}") from error
