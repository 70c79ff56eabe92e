"""Building blocks of every kernel: tiles in shared memory, products on the tensor cores, vectors of a chunk.

A kernel processes chunks of 64 tokens with one warpgroup. Registers hold float32 in the layout of the tensor cores'
accumulators; both operands of a product are in shared memory, in the 16-bit type of the inputs.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # tokens
SLAB = 64  # key channels that a block works on at a time

_ROWS = plgpu.Layout.WGMMA.reduce(1)  # one element per row of an accumulator
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def smem(*shape: int, dtype: Any, swizzle: int = 128) -> Any:
    """Return shared memory for an operand of the tensor cores (16-bit), or for a tile that is copied like one.

    Its rows are swizzled in segments of `swizzle` bytes, which must be the same for both operands of a product.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(*shape: int) -> jax.Array:
    """Return a float32 accumulator of zeros."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def products(*terms: Sequence[tuple[Any, Any]]) -> list[jax.Array]:
    """Return sums of products on the tensor cores, all in flight at once; a term is a list of pairs (a, b) of tiles."""

    def body(*accumulators: Any) -> list[jax.Array]:
        for accumulator, pairs in zip(accumulators, terms, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        # Without the barrier the compiler may delay reading the results until the next product has started.
        return lax.optimization_barrier([accumulator[...] for accumulator in accumulators])

    shapes = [plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32) for pairs in terms]
    return pl.run_scoped(body, *shapes)


def product(a: Any, b: Any) -> jax.Array:
    """Return a @ b of two tiles, float32."""
    return products([(a, b)])[0]


def read(tile: Any) -> jax.Array:
    """Load a tile into float32 registers."""
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def read_global(matrix: Any) -> jax.Array:
    """Load a float32 matrix from global memory into registers."""
    return plgpu.load(matrix, layout=plgpu.Layout.WGMMA, optimized=False) * 1.0


def read_global_rows(vector: Any) -> jax.Array:
    """Load a float32 vector from global memory into registers, one element per row of an accumulator."""
    return plgpu.load(vector, layout=_ROWS, optimized=False)


def read_global_columns(vector: Any) -> jax.Array:
    """Load a float32 vector from global memory into registers, one element per column of an accumulator."""
    return plgpu.load(vector, layout=_COLUMNS, optimized=False) * 1.0


def split(value: jax.Array, high: Any, low: Any) -> None:
    """Write float32 registers as the sum of two 16-bit tiles, which holds twice the digits of one."""
    if high.dtype == jnp.bfloat16:
        # Integer arithmetic: the instructions that convert to bfloat16 and back run at a quarter of the rate.
        bits = lax.bitcast_convert_type(value, jnp.int32) + 0x8000
        rounded = lax.bitcast_convert_type(bits & -0x10000, jnp.float32)
    else:
        rounded = value.astype(high.dtype).astype(jnp.float32)
    high[...] = rounded.astype(high.dtype)
    low[...] = (value - rounded).astype(low.dtype)


def split_terms(a: Sequence[Any], b: Sequence[Any], *, short: bool = False) -> list[tuple[Any, Any]]:
    """Return the pairs of tiles whose products sum to a @ b, for matrices of one or two halves each (high, low).

    The product of both low halves is left out: it is smaller than the rounding error of the others.

    Args:
        a, b: the halves.
        short: the low half of a is 0 and left out.
    """
    a = a[:1] if short else a
    return [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]


def read_rows(vector: Any) -> jax.Array:
    """Load a vector from shared memory into registers, one element per row of an accumulator."""
    return plgpu.load(vector, layout=_ROWS)


def read_columns(vector: Any) -> jax.Array:
    """Load a vector from shared memory into registers, one element per column of an accumulator."""
    return plgpu.load(vector, layout=_COLUMNS)


def zero_rows(size: int) -> jax.Array:
    """Return float32 zeros, one per row of an accumulator."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _ROWS)


def row_scale(vector: Any, like: jax.Array) -> jax.Array:
    """Load a vector [rows] from shared memory and broadcast it along the columns of an accumulator."""
    return along_columns(read_rows(vector), like)


def along_columns(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcast a vector in registers, one element per row, along the columns of an accumulator."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, like.shape, [0]), plgpu.Layout.WGMMA)


def along_rows(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcast a vector in registers, one element per column, along the rows of an accumulator."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, like.shape, [1]), plgpu.Layout.WGMMA)


def column_scale(vector: Any, like: jax.Array) -> jax.Array:
    """Load a vector [columns] from shared memory and broadcast it along the rows of an accumulator."""
    return along_rows(read_columns(vector), like)


def indices(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Return the row and the column index of every element of an accumulator."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    return i, j


def opaque_address(*tiles: Any) -> list[Any]:
    """Return the same tiles, each with a leading axis, at addresses that the compiler cannot prove constant.

    In a loop it then computes addresses, and descriptors of products, where they are used. Constant ones it computes
    before the loop, and spills those that the registers cannot hold.
    """
    first = lax.optimization_barrier(jnp.int32(0))
    return [tile.at[pl.ds(first, tile.shape[0])] for tile in tiles]


def opaque_addresses(tiles: SimpleNamespace) -> SimpleNamespace:
    """Return a namespace of tiles, each under its `opaque_address`."""
    return SimpleNamespace(**dict(zip(vars(tiles), opaque_address(*vars(tiles).values()), strict=True)))
