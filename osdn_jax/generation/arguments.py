"""Checks of a request's arguments. Every error names the argument, what came and what was expected."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from osdn_jax.nn.arguments import shown


def number(name: str, value: Any) -> float:
    """Return a number as a float, infinite if it is too large for one. Raises TypeError for anything else."""
    if isinstance(value, str | bytes | bytearray | bool | np.bool_) or _axes(value):
        raise TypeError(f"{name}: got {shown(value)}, expected a number")
    try:
        return float(value)
    except OverflowError:
        return np.inf if value > 0 else -np.inf
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {shown(value)}, expected a number") from error


def integer(name: str, value: SupportsIndex) -> int:
    """Return an integer as an int. Raises TypeError for anything else."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected an integer")
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name}: got {shown(value)}, expected an integer") from error


def integer_between(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer. Raises ValueError unless it is from `low` to `high`."""
    value = integer(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected an integer from {low} to {high}")
    return value


def temperature(value: Any) -> float:
    """Return a temperature. Raises ValueError unless it is finite and at least 0."""
    value = number("temperature", value)
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"temperature: got {value}, expected a number of at least 0")
    return value


def top_p(value: Any) -> float:
    """Return a share of the probability. Raises ValueError unless it is in (0, 1]."""
    value = number("top_p", value)
    if not 0 < value <= 1:
        raise ValueError(f"top_p: got {value}, expected more than 0 and at most 1")
    return value


def top_k(value: Any) -> int:
    """Return a number of tokens, 0 for all. Raises ValueError if it is negative."""
    value = integer("top_k", value)
    if value < 0:
        raise ValueError(f"top_k: got {value}, expected at least 0 (0 keeps all tokens)")
    return min(value, 2**31 - 1)


def min_p(value: Any) -> float:
    """Return a relative probability. Raises ValueError unless it is in [0, 1]."""
    value = number("min_p", value)
    if not 0 <= value <= 1:
        raise ValueError(f"min_p: got {value}, expected a number from 0 to 1")
    return value


def repetition_penalty(value: Any) -> float:
    """Return a penalty. Raises ValueError unless it is finite and more than 0."""
    value = number("repetition_penalty", value)
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"repetition_penalty: got {value}, expected a number above 0 (1 is no penalty)")
    return float(np.clip(value, np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def max_tokens(value: Any, name: str = "max_tokens") -> int:
    """Return a number of tokens. Raises ValueError unless it is from 0 to 2^31 - 1."""
    value = integer(name, value)
    if not 0 <= value < 2**31:
        raise ValueError(f"{name}: got {value}, expected an integer from 0 to 2**31 - 1")
    return value


def seed(value: Any) -> int:
    """Return a random seed. Raises ValueError unless it has at most 64 bits."""
    value = integer("seed", value)
    if not 0 <= value < 2**64:
        raise ValueError(f"seed: got {value}, expected an integer from 0 to 2**64 - 1")
    return value


def at_least_one(name: str, value: Any) -> int:
    """Return an integer. Raises ValueError unless it is at least 1."""
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1")
    return value


def state_dtype(value: Any) -> jnp.dtype | None:
    """Return the dtype of states, None for the model's own. Raises ValueError for another one than two."""
    if value is None:
        return None
    try:
        found = jnp.dtype(value) if _axes(value) is None else None
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"state_dtype: got {shown(value)}, expected 'float32', 'bfloat16' or None")
    if found not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"state_dtype: got {found}, expected 'float32', 'bfloat16' or None")
    return found


def per_row(name: str, check: Callable[[Any], Any], value: Any, rows: int) -> list[Any]:
    """Return the checked value of each row, from one value for all of them or a sequence of one per row."""
    if _several(value):
        if len(value) != rows:
            raise ValueError(f"{name}: got {len(value)} values for {rows} prompts, expected one for each, or one value")
        return [check(x) for x in value]
    return [check(value)] * rows


def seeds(value: Any, rows: int) -> list[int]:
    """Return the seed of each row: the numbers that follow one seed, or a sequence of one per row."""
    found = per_row("seed", seed, value, rows)
    return found if _several(value) else [(x + row) % 2**64 for row, x in enumerate(found)]


def tokens(name: str, value: Any, vocabulary: int, *, empty: bool = False) -> Int[np.ndarray, " T"]:
    """Return tokens of the vocabulary as an int32 array.

    Raises:
        ValueError: there are none (unless `empty`), or one is outside the vocabulary.
        TypeError: they are not integers [T].
    """
    if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "__array__")):
        raise TypeError(f"{name}: got {shown(value)}, expected integers [T]")
    array = _token_array(name, value)
    if array.ndim == 1 and not array.size:
        if not empty:
            raise ValueError(f"{name}: got no tokens, expected at least one (such as the start of a document)")
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iuO":
        raise TypeError(f"{name}: got {array.dtype} of shape {list(array.shape)}, expected integers [T]")
    outside = array[(array < 0) | (array >= vocabulary)]
    if outside.size:
        raise ValueError(f"{name}: got token {outside[0]}, expected tokens of the vocabulary, 0 to {vocabulary - 1}")
    return array.astype(np.int32)


def token_set(name: str, value: Any, vocabulary: int) -> Int[np.ndarray, " n"]:
    """Return a set of tokens, possibly empty, as an array without repetitions. Raises as `tokens`."""
    found = elements(name, value, "a sequence of tokens")
    return np.unique(tokens(name, [integer(name, token) for token in found], vocabulary, empty=True))


def strings(name: str, value: Any) -> list[str]:
    """Return strings as a list, from one string or a sequence of them. Raises TypeError for anything else."""
    found = [value] if isinstance(value, str) else elements(name, value, "a string or a sequence of strings")
    for string in found:
        if not isinstance(string, str):
            raise TypeError(f"{name}: got {shown(string)}, expected strings")
    return found


def elements(name: str, value: Any, expected: str) -> list[Any]:
    """Return the elements of a sequence, set or other iterable. Raises TypeError for a string and anything else."""
    if not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__iter__") and _axes(value) != 0:
        return list(value)
    raise TypeError(f"{name}: got {shown(value)}, expected {expected}")


def tokenizer(value: Any, *, needed: Sequence[str] = ("encode", "stream_decoder", "bos_id", "vocab_size")) -> Any:
    """Return a tokenizer. Raises TypeError unless it is an object with the attributes `needed`."""
    if isinstance(value, type):
        raise TypeError(f"tokenizer: got the class {value.__name__}, expected a tokenizer")
    missing = [attribute for attribute in needed if not hasattr(value, attribute)]
    if missing:
        raise TypeError(f"tokenizer: got {type(value).__name__} without {missing[0]}, expected a tokenizer")
    return value


def forbidden(value: Any, vocabulary: int, known: int | None = None) -> Int[np.ndarray, " n"]:
    """Return the forbidden tokens.

    Args:
        value: the tokens.
        vocabulary: number of logits.
        known: number of tokens that a tokenizer has; those from it on are forbidden too. Default: all.

    Raises:
        ValueError: a token is outside the vocabulary, or no token is left.
        TypeError: they are no integers.
    """
    given = token_set("forbidden", value, vocabulary)
    beyond = np.arange(vocabulary if known is None else min(known, vocabulary), vocabulary, dtype=np.int32)
    found = np.union1d(given, beyond)
    if len(found) == vocabulary:
        raise ValueError(
            f"forbidden: got all {vocabulary - len(beyond)} tokens of the vocabulary, expected at most "
            f"{vocabulary - len(beyond) - 1}"
        )
    return found


def _axes(value: Any) -> int | None:
    """Return the number of axes of an array, None for anything else."""
    return value.ndim if isinstance(value, (np.ndarray, np.generic, jax.Array)) else None


def _several(value: Any) -> bool:
    """Return whether a value of an option is a sequence of values, one per row."""
    return (isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))) or bool(_axes(value))


def _token_array(name: str, value: Any) -> np.ndarray:
    """Return tokens as an array, of Python's integers where NumPy has no type for them, such as 2**64."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):  # such as lists of several lengths
        array = np.zeros((), object)
    of_integers = isinstance(value, Sequence) and not any(isinstance(x, float | np.floating) for x in value)
    if array.dtype.kind == "O" or (array.dtype.kind == "f" and of_integers):
        found = [integer(name, token) for token in elements(name, value, "integers [T]")]
        return np.asarray(found, object)
    return array
