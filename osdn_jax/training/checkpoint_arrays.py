"""The arrays of a checkpoint: names, shapes, dtypes, shardings and checksums."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

type PyTree = Any

_BLOCK = 1 << 20  # words of a checksum at a time


def leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Return (path, leaf) of each leaf, such as ("params/head/kernel", array)."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _check_leaf(path: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        raise TypeError(f"{path} is a {type(leaf).__name__}; a checkpoint holds jax arrays")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{path} is a typed random key; give jax.random.key_data of it, and wrap_key_data on restoring")
    if leaf.size == 0:
        raise TypeError(f"{path} has no elements (shape {leaf.shape}), which orbax cannot save")


def abstract(tree: PyTree) -> PyTree:
    """Return the tree's shapes, dtypes and shardings. Raises TypeError for a leaf that is neither array nor struct."""
    for path, leaf in leaves(tree):
        _check_leaf(path, leaf)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), tree)


def checksums(tree: PyTree) -> dict[str, int]:
    """Return {path: checksum} of each array; transfers one number per array from the device.

    A checksum is Σ word · (2 · position + 1) mod 2³² over the array's words of at most 32 bits. A change of any single
    word changes it, because an odd factor is invertible mod 2³².
    """
    for path, leaf in leaves(tree):
        _check_leaf(path, leaf)
    return {path: _on_host(leaf) if _is_on_host(leaf) else _on_device(leaf) for path, leaf in leaves(tree)}


def _is_on_host(x: jax.Array) -> bool:
    platforms = {device.platform for device in x.devices()}
    return platforms == {"cpu"} and x.is_fully_replicated


def _on_host(x: jax.Array) -> int:
    """Return the checksum of an array in this process's memory; it would take longer to compile a program for it."""
    values = np.asarray(x).reshape(-1)
    words, total = values.view(f"u{min(values.itemsize, 4)}"), 0
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        position = np.arange(start, start + len(block), dtype=np.uint64).astype(np.uint32)
        total += int(np.sum(block * (position * np.uint32(2) + np.uint32(1)), dtype=np.uint32))
    return total % 2**32


def _on_device(x: jax.Array) -> int:
    # Waits for it: on a CPU, programs that wait behind 32 others hold the threads that a collective needs.
    return int(jax.block_until_ready(_sum_on_device(x)))


@jax.jit
def _sum_on_device(x: jax.Array) -> jax.Array:
    """Return the checksum as uint32 []; positions come from the indices of each axis, so shards stay in place."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    return jnp.sum(words * (position * np.uint32(2) + np.uint32(1)), dtype=jnp.uint32)
