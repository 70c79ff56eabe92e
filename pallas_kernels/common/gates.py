"""Decays of pairs of tokens in a chunk, from the scale factors of `token_gates`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK, column_scale, indices, row_scale
from pallas_kernels.common.token_gates import COARSE, FINE, GATES, SEGMENT

PAIR_ROWS = 3  # of the gates, the last ones, which are also read along columns


def pair_rows_of(gates: Any) -> Any:
    """Return the rows [PAIR_ROWS, 64] of the gates of a chunk that are also read along columns."""
    return gates.at[pl.ds(GATES - PAIR_ROWS, PAIR_ROWS)]


def pair_rows_tile(*stages: int) -> Any:
    """Return shared memory for a second copy of these rows.

    The compiler gives a vector in shared memory a single layout, along rows or along columns.
    """
    return plgpu.SMEM((*stages, PAIR_ROWS, CHUNK), jnp.float32)


def pair_decay(gates: Any, pair_rows: Any, *, decay: bool, resets: bool) -> jax.Array:
    """Return the decay [64, 64] from token j to token i >= j; 0 above the diagonal and between segments.

    Args:
        gates: of the chunk [GATES, 64], in shared memory.
        pair_rows: the second copy of `pair_rows_of(gates)`, in shared memory.
        decay: apply the scalar decay of COARSE and FINE.
        resets: keep only pairs within one segment.
    """
    i, j = indices((CHUNK, CHUNK))
    keep = i >= j
    left = jnp.where(keep, 1.0, 0.0)
    if resets:
        left = jnp.where(row_scale(gates.at[SEGMENT], left) == _column(pair_rows, SEGMENT, left), left, 0.0)
    if decay:
        # Above the diagonal the difference is positive and may overflow: mask it before taking exp.
        sums = row_scale(gates.at[COARSE], left) - _column(pair_rows, COARSE, left)
        sums = sums + (row_scale(gates.at[FINE], left) - _column(pair_rows, FINE, left))
        left = left * jnp.exp(jnp.where(keep, sums, 0.0))
    return left


def _column(pair_rows: Any, row: int, like: jax.Array) -> jax.Array:
    return column_scale(pair_rows.at[row - (GATES - PAIR_ROWS)], like)
