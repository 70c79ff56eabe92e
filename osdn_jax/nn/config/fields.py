"""Checks of the fields of configurations."""

import dataclasses
from typing import Any

from osdn_jax.ops import checks


def positive(name: str, value: float) -> None:
    """Raise ValueError unless value is above 0."""
    if checks.number(name, value) <= 0:
        raise ValueError(f"{name}: got {value}, expected more than 0")


def at_least_one(name: str, value: int) -> None:
    """Raise ValueError unless value is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an int of at least 1")


def nested(config: Any, name: str, *kinds: type[Any]) -> None:
    """Replace a field that is a dict, as `dataclasses.asdict` writes it, by the config whose fields it has.

    Raises TypeError for any other type, and for a dict whose keys do not identify one config.
    """
    value = getattr(config, name)
    if not isinstance(value, kinds):
        object.__setattr__(config, name, chosen(name, value, *kinds)(**value))


def chosen(name: str, value: Any, *kinds: type[Any]) -> type[Any]:
    """Return the config whose fields a dict has, as `dataclasses.asdict` writes it.

    Raises TypeError for any other type, and for a dict whose keys do not identify one config.
    """
    names = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(value, dict):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a {names}")
    fitting = [kind for kind in kinds if set(value) <= {field.name for field in dataclasses.fields(kind)}]
    if len(fitting) != 1:
        raise TypeError(f"{name}: got a dict with the keys {', '.join(map(str, value))}, expected those of a {names}")
    return fitting[0]


def divides_heads(key_heads: int | None, heads: int) -> None:
    """Raise ValueError unless key_heads is None or divides heads."""
    if key_heads is not None:
        at_least_one("key_heads", key_heads)
        if heads % key_heads:
            raise ValueError(f"key_heads: got {key_heads}, expected a divisor of the {heads} heads")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the known ones."""
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
