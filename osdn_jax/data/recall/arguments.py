"""Checks of the generators' arguments, with errors that name the argument."""

import math
import numbers
import operator
from typing import Any

import numpy as np

IGNORE = -100  # the target where nothing is asked


def checked_int(name: str, value: Any, least: int) -> int:
    """Return `value` as an int. Raises TypeError if it is not an integer, ValueError if it is below `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from error
    if number < least:
        raise ValueError(f"{name}: got {number}, expected at least {least}")
    return number


def checked_float(name: str, value: Any, least: float, most: float, *, above: bool = False) -> float:
    """Return `value` as a float from `least` (above it, if `above`) to `most`. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    number = float(value)
    if not (math.isfinite(number) and least <= number <= most) or (above and number == least):
        edge = "above" if above else "from"
        words = f"a finite number {edge} {least:g}" + ("" if math.isinf(most) else f" to {most:g}")
        raise ValueError(f"{name}: got {value!r}, expected {words}")
    return number


def checked_bool(name: str, value: Any) -> bool:
    """Return `value` as a bool. Raises TypeError for anything else than a bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def checked_even(name: str, value: int) -> int:
    """Return `value`. Raises ValueError if it is odd."""
    if value % 2:
        raise ValueError(f"{name}: got {value}, expected an even number")
    return value


def generator(seed: Any) -> np.random.Generator:
    """Return NumPy's generator of a seed: an integer of at least 0, or a tuple of them."""
    parts = seed if isinstance(seed, tuple) else (seed,)
    checked = [checked_int("seed", part, 0) for part in parts]
    return np.random.default_rng(checked if isinstance(seed, tuple) else checked[0])
