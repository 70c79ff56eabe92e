"""The inverse of a unit lower triangular 64 x 64 matrix on the tensor cores, to float32's order of precision."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK, indices, products, read, smem, split, split_terms

BLOCK = 16  # the tensor cores' shortest sum


def _scratch(columns: int) -> Any:
    """A float32 matrix as the sum of two bfloat16 ones, 16 bits of its 24, whose columns are read in blocks of 16."""
    return smem(2, CHUNK, columns, dtype=jnp.bfloat16, swizzle=2 * BLOCK)


SCRATCH = [_scratch(columns) for columns in (CHUNK, CHUNK, BLOCK, BLOCK, 2 * BLOCK)]


def unit_lower_inverse(lower: jax.Array, scratch: Sequence[Any]) -> jax.Array:
    """(I + A)^-1 for A [64, 64] in registers, whose numbers on and above the diagonal are ignored.

    By block doubling: X, the inverse of the diagonal blocks of size n, becomes that of twice the size as X - X (A X),
    where of A X only the corners that join two blocks count. This is backward stable where keys are nearly parallel,
    and a Neumann series is not. Each product is three of the bfloat16 halves, and of the columns and rows that count.

    Args:
        lower: A.
        scratch: shared memory as in `SCRATCH`; `times_inverse` needs it as it is left.
    """
    a, x, diagonal, corner, wide = scratch
    joined = wide.at[:, :, pl.ds(0, BLOCK)]
    i, j = indices((CHUNK, CHUNK))
    _split(jnp.where(i > j, lower, 0.0), a)
    plgpu.commit_smem()
    inverse = _diagonal_inverse(a, (diagonal, corner, joined))

    # From 16 to 32: the columns of blocks 0 and 2 receive what joins them with blocks 1 and 3.
    _split(inverse, diagonal)
    plgpu.commit_smem()
    first, second = _products(*((_columns(a, c), _rows(diagonal, c)) for c in (0, 2)))
    block = indices((CHUNK, BLOCK))[0] >> 4
    _split(jnp.where(block == 1, first, jnp.where(block == 3, second, 0.0)), joined)
    plgpu.commit_smem()
    first, second = _products(*((diagonal, _rows(joined, c)) for c in (1, 3)))
    corners = {0: first, 2: second}
    for c in range(4):
        column = jnp.where(block == c, inverse, 0.0)
        _split(jnp.where(block == c + 1, -corners[c], column) if c in corners else column, _columns(x, c))
    plgpu.commit_smem()

    # From 32 to 64: the columns of blocks 0 and 1 do.
    left = _columns(x, 0, 2)
    (product,) = _products((_columns(a, 0, 2), _rows(left, 0, 2)))
    _split(product, wide)
    plgpu.commit_smem()
    (product,) = _products((_columns(x, 2, 2), _rows(wide, 2, 2)))
    _split(read(left.at[0]) + read(left.at[1]) - product, left)
    plgpu.commit_smem()
    return read(x.at[0]) + read(x.at[1])


def times_inverse(matrix: jax.Array, scratch: Sequence[Any]) -> jax.Array:
    """matrix [64, 64] in registers times the inverse that `unit_lower_inverse` left in scratch, as precisely."""
    a, x, *_ = scratch
    _split(matrix, a)
    plgpu.commit_smem()
    return _products((a, x))[0]


def _diagonal_inverse(a: Any, scratch: Sequence[Any]) -> jax.Array:
    """The inverses of the four diagonal blocks [16, 16] of I + A, under one another [64, 16]."""
    x, corner, joined = scratch
    i, j = indices((CHUNK, BLOCK))
    block, i = i >> 4, i & (BLOCK - 1)

    def own(blocks: Sequence[jax.Array]) -> jax.Array:
        """Of matrices [64, 16], one per block, the rows of that block."""
        first, second, third, fourth = blocks
        return jnp.where(block < 2, jnp.where(block == 0, first, second), jnp.where(block == 2, third, fourth))

    def times(left: Any, right: Any) -> jax.Array:
        return own(_products(*((left, _rows(right, c)) for c in range(4))))

    lower = own([read(_columns(a, c).at[0]) + read(_columns(a, c).at[1]) for c in range(4)])
    inverse = jnp.where(i == j, 1.0, jnp.where((i == j + 1) & (i & 1 == 1), -lower, 0.0))

    def double(level: Any, inverse: jax.Array) -> jax.Array:
        size = jnp.int32(2) << level
        _split(inverse, x)
        _split(jnp.where(((i ^ j) & -size == size) & (i > j), lower, 0.0), corner)
        plgpu.commit_smem()
        _split(times(corner, x), joined)
        plgpu.commit_smem()
        inverse = inverse - times(x, joined)
        plgpu.commit_smem()  # the operands have served
        return inverse

    return lax.fori_loop(0, 3, double, inverse)


def _split(value: jax.Array, matrix: Any) -> None:
    split(value, matrix.at[0], matrix.at[1])


def _products(*pairs: tuple[Any, Any]) -> list[jax.Array]:
    """Products of matrices in two halves each."""
    return products(*(split_terms([a.at[0], a.at[1]], [b.at[0], b.at[1]]) for a, b in pairs))


def _columns(matrix: Any, first: int, count: int = 1) -> Any:
    return matrix.at[:, :, pl.ds(BLOCK * first, BLOCK * count)]


def _rows(matrix: Any, first: int, count: int = 1) -> Any:
    return matrix.at[:, pl.ds(BLOCK * first, BLOCK * count)]
