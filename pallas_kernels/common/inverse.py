"""The inverse of a unit lower triangular 64 x 64 matrix on the tensor cores, to about float32 precision."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK, indices, products, read, smem, split, split_terms

BLOCK = 16  # rows and columns of a diagonal block: the shortest sum of the tensor cores


def _halves(columns: int) -> Any:
    """Return shared memory for a float32 matrix as two bfloat16 halves, which hold 16 of its 24 bits.

    Its columns are read in blocks of 16.
    """
    return smem(2, CHUNK, columns, dtype=jnp.bfloat16, swizzle=2 * BLOCK)


SCRATCH = {
    "matrix": _halves(CHUNK),  # A
    "inverse": _halves(CHUNK),
    "diagonal": _halves(BLOCK),  # the inverses of the diagonal blocks, stacked
    "corner": _halves(BLOCK),
    "wide": _halves(2 * BLOCK),
}


def unit_lower_inverse(lower: jax.Array, scratch: Any) -> jax.Array:
    """Return (I + A)^-1 for A [64, 64] in registers, whose elements on and above the diagonal are ignored.

    By block doubling: X, the inverse of the diagonal blocks of size n, becomes that of the blocks of size 2n as
    X - X (A X), where of A X only the corners that join two blocks count. This is backward stable if keys are nearly
    parallel; a Neumann series is not. Each product is three products of bfloat16 halves, restricted to the rows and
    columns that contribute.

    Args:
        lower: A.
        scratch: namespace of references to `SCRATCH`; `times_inverse` needs their contents.
    """
    a, x, diagonal, wide = scratch.matrix, scratch.inverse, scratch.diagonal, scratch.wide
    joined = wide.at[:, :, pl.ds(0, BLOCK)]
    i, j = indices((CHUNK, CHUNK))
    _split(jnp.where(i > j, lower, 0.0), a)
    plgpu.commit_smem()
    inverse = _diagonal_inverse(a, diagonal, scratch.corner, joined)

    # From 16 to 32: join block 1 to block 0 and block 3 to block 2, in the columns of blocks 0 and 2.
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

    # From 32 to 64: join blocks 2 and 3 to blocks 0 and 1, in the columns of the latter.
    left = _columns(x, 0, 2)
    (product,) = _products((_columns(a, 0, 2), _rows(left, 0, 2)))
    _split(product, wide)
    plgpu.commit_smem()
    (product,) = _products((_columns(x, 2, 2), _rows(wide, 2, 2)))
    _split(read(left.at[0]) + read(left.at[1]) - product, left)
    plgpu.commit_smem()
    return read(x.at[0]) + read(x.at[1])


def times_inverse(matrix: jax.Array, scratch: Any) -> jax.Array:
    """Return matrix [64, 64], in registers, times the inverse that `unit_lower_inverse` left in scratch."""
    _split(matrix, scratch.matrix)
    plgpu.commit_smem()
    return _products((scratch.matrix, scratch.inverse))[0]


def _diagonal_inverse(a: Any, x: Any, corner: Any, joined: Any) -> jax.Array:
    """Return the inverses of the four diagonal blocks [16, 16] of I + A, stacked [64, 16]."""
    i, j = indices((CHUNK, BLOCK))
    block, i = i >> 4, i & (BLOCK - 1)

    def diagonal(columns: Sequence[jax.Array]) -> jax.Array:
        """Select from each of four block columns [64, 16] the rows of its diagonal block."""
        first, second, third, fourth = columns
        return jnp.where(block < 2, jnp.where(block == 0, first, second), jnp.where(block == 2, third, fourth))

    def times(left: Any, right: Any) -> jax.Array:
        return diagonal(_products(*((left, _rows(right, c)) for c in range(4))))

    lower = diagonal([read(_columns(a, c).at[0]) + read(_columns(a, c).at[1]) for c in range(4)])
    inverse = jnp.where(i == j, 1.0, jnp.where((i == j + 1) & (i & 1 == 1), -lower, 0.0))

    def double(level: Any, inverse: jax.Array) -> jax.Array:
        size = jnp.int32(2) << level
        _split(inverse, x)
        _split(jnp.where(((i ^ j) & -size == size) & (i > j), lower, 0.0), corner)
        plgpu.commit_smem()
        _split(times(corner, x), joined)
        plgpu.commit_smem()
        inverse = inverse - times(x, joined)
        plgpu.commit_smem()  # the operands are dead: the next level overwrites them
        return inverse

    return lax.fori_loop(0, 3, double, inverse)


def _split(value: jax.Array, matrix: Any) -> None:
    split(value, matrix.at[0], matrix.at[1])


def _products(*pairs: tuple[Any, Any]) -> list[jax.Array]:
    """Return products of matrices that are each given as two halves."""
    return products(*(split_terms([a.at[0], a.at[1]], [b.at[0], b.at[1]]) for a, b in pairs))


def _columns(matrix: Any, first: int, count: int = 1) -> Any:
    return matrix.at[:, :, pl.ds(BLOCK * first, BLOCK * count)]


def _rows(matrix: Any, first: int, count: int = 1) -> Any:
    return matrix.at[:, pl.ds(BLOCK * first, BLOCK * count)]
