"""The inverse of a unit lower triangular 64 x 64 matrix on the tensor cores, to float32's order of precision."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import CHUNK, indices, products, smem, split, split_terms

# Each float32 matrix lies in shared memory as the sum of two bfloat16 ones: 16 bits of its 24.
SCRATCH = [smem(CHUNK, CHUNK, dtype=jnp.bfloat16)] * 6


def unit_lower_inverse(lower: jax.Array, scratch: Any) -> jax.Array:
    """(I + A)^-1 for A [64, 64] in registers, whose numbers on and above the diagonal are ignored.

    By block doubling: X, the inverse of the diagonal blocks of size n, becomes that of twice the size as X - X (A X),
    where of A X only the corners that join two blocks count. This is backward stable where keys are nearly parallel,
    and a Neumann series is not. Each product is three of the bfloat16 halves.
    """
    a, x, joined = scratch[0:2], scratch[2:4], scratch[4:6]
    i, j = indices((CHUNK, CHUNK))
    split(jnp.where(i > j, lower, 0.0), *a)
    inverse = jnp.where(i == j, 1.0, jnp.where((i == j + 1) & (i % 2 == 1), -lower, 0.0))
    size = 2
    while size < CHUNK:
        split(inverse, *x)
        plgpu.commit_smem()
        corners = (i // size == j // size + 1) & (i // size % 2 == 1)
        split(jnp.where(corners, products(split_terms(a, x))[0], 0.0), *joined)
        plgpu.commit_smem()
        inverse = inverse - products(split_terms(x, joined))[0]
        size *= 2
    return inverse


def times_inverse(matrix: jax.Array, inverse: jax.Array, scratch: Any) -> jax.Array:
    """matrix @ inverse of two matrices [64, 64] in registers, to the same precision."""
    split(matrix, *scratch[0:2])
    split(inverse, *scratch[2:4])
    plgpu.commit_smem()
    return products(split_terms(scratch[0:2], scratch[2:4]))[0]
