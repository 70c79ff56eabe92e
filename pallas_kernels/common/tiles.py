"""What every kernel is made of: tiles in shared memory, products on the tensor cores, vectors of a chunk.

A kernel works on chunks of 64 tokens with one warpgroup. Registers hold float32 in the layout of the tensor cores'
accumulators; both operands of a product lie in shared memory, in the inputs' 16-bit type.
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

_ROWS = plgpu.Layout.WGMMA.reduce(1)  # one number per row of an accumulator
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def smem(*shape: int, dtype: Any, swizzle: int = 128) -> Any:
    """An operand of the tensor cores (16-bit) or of a copy of such a tile, in shared memory.

    Its rows are swizzled in pieces of `swizzle` bytes; the two operands of a product must agree in that.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = min(swizzle, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(*shape: int) -> jax.Array:
    """A float32 accumulator of zeros."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def products(*terms: Sequence[tuple[Any, Any]]) -> list[jax.Array]:
    """Sums of products on the tensor cores, all in flight at once: each term is a list of pairs (a, b) of tiles."""

    def body(*accumulators: Any) -> list[jax.Array]:
        for accumulator, pairs in zip(accumulators, terms, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        # Without the barrier the compiler may put off reading the results until after the next product has begun.
        return lax.optimization_barrier([accumulator[...] for accumulator in accumulators])

    shapes = [plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32) for pairs in terms]
    return pl.run_scoped(body, *shapes)


def product(a: Any, b: Any) -> jax.Array:
    """a @ b of two tiles, float32."""
    return products([(a, b)])[0]


def read(tile: Any) -> jax.Array:
    """A tile as float32 registers."""
    return plgpu.load(tile, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def read_global(matrix: Any) -> jax.Array:
    """A float32 matrix in device memory as registers."""
    return plgpu.load(matrix, layout=plgpu.Layout.WGMMA, optimized=False) * 1.0


def read_global_rows(vector: Any) -> jax.Array:
    """A float32 vector in device memory as registers, one number per row of an accumulator."""
    return plgpu.load(vector, layout=_ROWS, optimized=False)


def read_global_columns(vector: Any) -> jax.Array:
    """A float32 vector in device memory as registers, one number per column of an accumulator."""
    return plgpu.load(vector, layout=_COLUMNS, optimized=False) * 1.0


def split(value: jax.Array, high: Any, low: Any) -> None:
    """Writes float32 registers as the sum of two 16-bit tiles, which holds twice the digits of one."""
    if high.dtype == jnp.bfloat16:
        # In integers, since a conversion to bfloat16 and back takes instructions of a quarter of the rate.
        bits = lax.bitcast_convert_type(value, jnp.int32) + 0x8000
        rounded = lax.bitcast_convert_type(bits & -0x10000, jnp.float32)
    else:
        rounded = value.astype(high.dtype).astype(jnp.float32)
    high[...] = rounded.astype(high.dtype)
    low[...] = (value - rounded).astype(low.dtype)


def split_terms(a: Sequence[Any], b: Sequence[Any], *, short: bool = False) -> list[tuple[Any, Any]]:
    """The products of tiles that make a @ b of two matrices, each in one or two halves; short: the low half of a is 0.

    That of both low halves is below the rounding of the others.
    """
    a = a[:1] if short else a
    return [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]


def read_rows(vector: Any) -> jax.Array:
    """A vector in shared memory as registers, one number per row of an accumulator."""
    return plgpu.load(vector, layout=_ROWS)


def read_columns(vector: Any) -> jax.Array:
    """A vector in shared memory as registers, one number per column of an accumulator."""
    return plgpu.load(vector, layout=_COLUMNS)


def zero_rows(size: int) -> jax.Array:
    """Float32 zeros, one per row of an accumulator."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _ROWS)


def zero_columns(size: int) -> jax.Array:
    """Float32 zeros, one per column of an accumulator."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _COLUMNS)


def row_scale(vector: Any, like: jax.Array) -> jax.Array:
    """A vector in shared memory, [rows], broadcast along the columns of an accumulator."""
    return along_columns(read_rows(vector), like)


def along_columns(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector in registers, one number per row, broadcast along the columns of an accumulator."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, like.shape, [0]), plgpu.Layout.WGMMA)


def along_rows(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector in registers, one number per column, broadcast along the rows of an accumulator."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, like.shape, [1]), plgpu.Layout.WGMMA)


def column_scale(vector: Any, like: jax.Array) -> jax.Array:
    """A vector in shared memory, [columns], broadcast along the rows of an accumulator."""
    return along_rows(read_columns(vector), like)


def indices(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Row and column of every number of an accumulator."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    return i, j


def opaque_address(*tiles: Any) -> list[Any]:
    """The same tiles, each with a leading axis, at addresses that the compiler takes for new ones.

    In a loop it then forms addresses, and descriptors of products, where they are used. Those that it knows not to
    change it forms before the loop, and spills what the registers do not hold of them.
    """
    first = lax.optimization_barrier(jnp.int32(0))
    return [tile.at[pl.ds(first, tile.shape[0])] for tile in tiles]


def opaque_addresses(tiles: SimpleNamespace) -> SimpleNamespace:
    """Return a namespace of tiles, each under its `opaque_address`."""
    return SimpleNamespace(**dict(zip(vars(tiles), opaque_address(*vars(tiles).values()), strict=True)))
