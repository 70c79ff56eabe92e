"""The families of models that can be loaded, by their model_type."""

from collections.abc import Mapping
from typing import Any

from osdn_jax.interop.families import (
    own,
)
from osdn_jax.interop.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (own.FAMILY,)}
"""{name: family}, in the order in which the documentation lists them."""

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
