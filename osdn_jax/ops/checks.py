"""Argument checks, at trace time. Every error names the argument, what came and what was expected."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax.ops import sequence_parallel

Shape = tuple[int, ...]

_LOG_OF_RESET = -1000.0


def floating_array(name: str, value: Any, ndim: int | Sequence[int], layout: str) -> jax.Array:
    """Return value as a floating-point array of this rank, or raise TypeError or ValueError."""
    array = _array(name, value, layout)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected a floating-point {layout}")
    ranks = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if array.ndim not in ranks:
        raise ValueError(f"{name}: got shape {array.shape}, expected {layout}")
    return array


def shaped_array(name: str, value: Any, shapes: Shape | Sequence[Shape], layout: str) -> jax.Array:
    """Return value as a floating-point array of one of the shapes, or raise TypeError or ValueError."""
    allowed = [shapes] if not shapes or isinstance(shapes[0], int) else list(shapes)
    array = floating_array(name, value, [len(shape) for shape in allowed], layout)  # type: ignore[arg-type]
    if array.shape not in allowed:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(allowed))
        raise ValueError(f"{name}: got shape {array.shape}, expected {layout} = {expected}")
    return array


def tokens(q: Any, k: Any, v: Any, *, time: bool = True) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return q, k [B, T, Hk, K] and v [B, T, H, V] as arrays whose shapes fit, or raise TypeError or ValueError.

    With time=False they are one token, without the axis T.
    """
    lead, axes = ("B, T, ", 2) if time else ("B, ", 1)
    q = floating_array("q", q, axes + 2, f"[{lead}Hk, K]")
    k = shaped_array("k", k, q.shape, f"[{lead}Hk, K] like q")
    v = floating_array("v", v, axes + 2, f"[{lead}H, V]")
    leading, (key_heads, key_dim), (heads, value_dim) = q.shape[:axes], q.shape[axes:], v.shape[axes:]
    if v.shape[:axes] != leading:
        raise ValueError(f"v: got shape {v.shape}, expected [{lead}H, V] with the leading axes {leading} of q")
    if not key_heads or heads % key_heads:
        raise ValueError(f"v: got {heads} value heads, expected a multiple of the {key_heads} key heads of q")
    for name, size in (("q", key_dim), ("v", value_dim)):
        if size < 1:
            raise ValueError(f"{name}: got a head dimension of {size}, expected at least 1")
    return q, k, v


def segment_ids(value: Any, shape: Shape) -> jax.Array:
    """Return value as an integer [B, T] array that keeps different ids apart, or raise TypeError or ValueError.

    JAX truncates NumPy's 64-bit integers to 32 bits unless x64 is enabled; ids that would change are renumbered first.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
        kept = jnp.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
        if value.min() < kept.min or value.max() > kept.max:
            value = np.unique(value, return_inverse=True)[1].reshape(value.shape).astype(np.int32)
    return integer_array("segment_ids", value, shape, "[B, T]")


def integer_array(name: str, value: Any, shape: Shape, layout: str) -> jax.Array:
    """Return value as an integer array of this shape, or raise TypeError or ValueError."""
    array = _array(name, value, layout)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected an integer {layout}")
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {layout} = {shape}")
    return array


def indices(name: str, value: Any, shape: Shape, layout: str, size: int) -> jax.Array:
    """Return indices below size as an int32 array of this shape; raise as `integer_array`.

    An index outside [0, size) stays outside, even if truncation to 32 bits would move it inside.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        inside = (value >= 0) & (value < size)
        value = np.where(inside, value.astype(np.int32), -1)  # in NumPy, since JAX would truncate to 32 bits
    array = integer_array(name, value, shape, layout)
    if array.dtype.itemsize < 4:
        return array.astype(jnp.int32)
    if array.dtype == jnp.int32:
        return array
    return jnp.where((array >= 0) & (array < size), array.astype(jnp.int32), -1)


def floating_dtype(name: str, value: Any) -> jnp.dtype:
    """Return a type, its name or a scalar class as a floating-point dtype, or raise TypeError."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if value is None or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: got {value!r}, expected a floating-point type such as jnp.float32")
    return dtype


def chunk_size(value: Any) -> int | None:
    """Return a positive int or None, or raise TypeError or ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"chunk_size: got {value!r}, expected a positive int or None")
    if value < 1:
        raise ValueError(f"chunk_size: got {value}, expected at least 1")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """Return value as a bool, or raise TypeError, since a string such as "no" would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {value!r}, expected True or False")
    return bool(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Return True if an argument that may be an array is a static number; `number` checks its value."""
    return isinstance(value, (int, float, np.floating, np.integer))


def number(name: str, value: Any) -> float:
    """Return a static real number as a float, or raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name}: got {value!r}, expected a static number")
    if not np.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return float(value)


def array_or_number(name: str, value: Any, shapes: Sequence[Shape]) -> jax.Array | float | None:
    """Return None, a static number or an array of one of the shapes, or raise TypeError or ValueError."""
    if value is None:
        return None
    if is_number(value):
        return number(name, value)  # not an array: it takes the type of the state
    return shaped_array(name, value, shapes, "a number, [Hk, K] or [B, Hk, K]")


def bounds(value: Any) -> tuple[float, float] | None:
    """Return (lo, hi) with lo <= hi, each possibly infinite, or None; or raise TypeError or ValueError."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"bounds: got {value!r}, expected a pair (lo, hi) or None")
    lo, hi = (x if x in (-np.inf, np.inf) else number("bounds", x) for x in value)
    if lo > hi:
        raise ValueError(f"bounds: got ({lo}, {hi}), an empty range; expected lo <= hi")
    return lo, hi


def implementation(value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless value is None or one of the known names."""
    names = sorted(known)
    if value is not None and value not in names:
        raise ValueError(f"implementation: got {value!r}, expected None or one of {', '.join(names)}")


def bounded_log(x: jax.Array) -> jax.Array:
    """Clip the log of a decay at -1000, so that sums of logs stay finite and exact.

    The decay does not change: exp(-746) is 0 in float64, and exp(-104) in float32. A full reset (-inf) becomes finite;
    NaN stays NaN. The scan of the delta rule multiplies by decays and needs no such bound.
    """
    return jnp.where(x < _LOG_OF_RESET, jnp.asarray(_LOG_OF_RESET, x.dtype), x)


def accumulator_dtype(*arrays: jax.Array | None) -> Any:
    """Return float64 if an input is float64, else float32: the type of states, gates and sums."""
    wide = any(x is not None and x.dtype == jnp.float64 for x in arrays)
    return jnp.float64 if wide else jnp.float32


def varying_like(state: jax.Array, *arrays: jax.Array | None) -> jax.Array:
    """Mark the state, under shard_map, as varying over every mesh axis that one of the arrays varies over.

    `lax.scan` requires that of its carry, and zeros created here vary over no axis.
    """
    return sequence_parallel.vary(state, sequence_parallel.axes_of((state, *arrays)))


def resets(ids: jax.Array, context_axis: str | None = None) -> jax.Array:
    """Mark the tokens at which the segment id changes, [B, T] ids -> [B, T] bool; never the sequence's first token."""
    first = ids[:, :1] if context_axis is None else sequence_parallel.ids_before(ids, context_axis)
    return ids != jnp.concatenate([first, ids], axis=1)[:, : ids.shape[1]]


def _array(name: str, value: Any, layout: str) -> jax.Array:
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an array {layout}")
    try:
        return jnp.asarray(value)
    except TypeError as error:  # such as an array of strings
        raise TypeError(f"{name}: got dtype {value.dtype}, expected an array {layout}") from error
