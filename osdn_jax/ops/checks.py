"""Checks of arguments: every error names the argument, what came and what was expected, at trace time."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax.ops import collectives

Shape = tuple[int, ...]

_LOG_OF_NOTHING = -1000.0


def floating_array(name: str, value: Any, ndim: int | Sequence[int], layout: str) -> jax.Array:
    """Returns value as an array, or raises: TypeError for no array or no floating type, ValueError for its rank."""
    array = _array(name, value, layout)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected a floating-point {layout}")
    ranks = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if array.ndim not in ranks:
        raise ValueError(f"{name}: got shape {array.shape}, expected {layout}")
    return array


def shaped_array(name: str, value: Any, shapes: Shape | Sequence[Shape], layout: str) -> jax.Array:
    """Returns value as a floating array of one of the shapes, or raises TypeError or ValueError."""
    allowed = [shapes] if not shapes or isinstance(shapes[0], int) else list(shapes)
    array = floating_array(name, value, [len(shape) for shape in allowed], layout)  # type: ignore[arg-type]
    if array.shape not in allowed:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name}: got shape {array.shape}, expected {layout} = {expected}")
    return array


def segment_ids(value: Any, shape: Shape) -> jax.Array:
    """Returns value as an integer [B, T] array that keeps different ids apart, or raises TypeError or ValueError.

    JAX cuts NumPy's integers of 64 bits to 32 unless it runs in 64; those that would change are numbered first.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
        kept = jnp.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
        if value.min() < kept.min or value.max() > kept.max:
            value = np.unique(value, return_inverse=True)[1].reshape(value.shape).astype(np.int32)
    return integer_array("segment_ids", value, shape, "[B, T]")


def integer_array(name: str, value: Any, shape: Shape, layout: str) -> jax.Array:
    """Returns value as an integer array of this shape, or raises TypeError or ValueError."""
    array = _array(name, value, layout)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected an integer {layout}")
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {layout} = {shape}")
    return array


def indices(name: str, value: Any, shape: Shape, layout: str, size: int) -> jax.Array:
    """Returns indices below size as an int32 array of this shape; raises as `integer_array`.

    Those outside stay outside, below 0 or not below size: no cut to 32 bits brings one back.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        inside = (value >= 0) & (value < size)
        value = np.where(inside, value.astype(np.int32), -1)  # here, since JAX would cut 64 bits to 32
    array = integer_array(name, value, shape, layout)
    if array.dtype.itemsize < 4:
        return array.astype(jnp.int32)
    if array.dtype == jnp.int32:
        return array
    return jnp.where((array >= 0) & (array < size), array.astype(jnp.int32), -1)


def chunk_size(value: Any) -> int | None:
    """Returns a positive int or None, or raises TypeError or ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"chunk_size: got {value!r}, expected a positive int or None")
    if value < 1:
        raise ValueError(f"chunk_size: got {value}, expected at least 1")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Returns value as a bool, or raises TypeError: a word such as "no" would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether an argument that may be an array is a static number instead; `number` checks which."""
    return isinstance(value, (int, float, np.floating, np.integer))


def number(name: str, value: Any) -> float:
    """Returns a static real number as a float, or raises TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}: got {value!r}, expected a static number")
    if not np.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return float(value)


def bounds(value: Any) -> tuple[float, float] | None:
    """Returns (lo, hi) with lo <= hi, each perhaps infinite, or None; or raises TypeError or ValueError."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"bounds: got {value!r}, expected a pair (lo, hi) or None")
    lo, hi = (x if x in (-np.inf, np.inf) else number("bounds", x) for x in value)
    if lo > hi:
        raise ValueError(f"bounds: got ({lo}, {hi}), an empty range; expected lo <= hi")
    return lo, hi


def implementation(value: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless value is None or one of the known names."""
    names = sorted(known)
    if value is not None and value not in names:
        raise ValueError(f"implementation: got {value!r}, expected None or one of {', '.join(names)}")


def bounded_log(x: jax.Array) -> jax.Array:
    """The log of a decay, cut where the decay has long been zero, so that sums of logs stay finite and exact.

    exp(-746) is 0 in float64 and exp(-104) in float32. A full reset (-inf) so becomes a finite number, and NaN stays.
    A product of decays, as the scans form it, needs no such bound.
    """
    return jnp.where(x < _LOG_OF_NOTHING, jnp.asarray(_LOG_OF_NOTHING, x.dtype), x)


def accumulator_dtype(*arrays: jax.Array | None) -> Any:
    """float64 where an input is float64, else float32: the type of memories, gates and sums."""
    wide = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.float64 if wide else jnp.float32


def varying_like(state: jax.Array, *arrays: jax.Array | None) -> jax.Array:
    """The state, under shard_map as one that varies over every mesh axis that one of the arrays varies over.

    A scan asks that of its carry. Zeros made here vary over none.
    """
    return collectives.vary(state, collectives.axes_of((state, *arrays)))


def restarts(ids: jax.Array, context_axis: str | None = None) -> jax.Array:
    """Whether a new document starts at each token: [B, T] ids -> [B, T] bool; never at the first token of all."""
    first = ids[:, :1] if context_axis is None else collectives.before(ids, context_axis)
    return ids != jnp.concatenate([first, ids], axis=1)[:, : ids.shape[1]]


def _array(name: str, value: Any, layout: str) -> jax.Array:
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an array {layout}")
    return jnp.asarray(value)
