"""What every token of a chunk is scaled by, as the kernels read it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK, column_scale, indices, row_scale

# Rows of the gates of a chunk, [GATES, 64] float32; the first three are all that the recurrences read.
BETA = 0
FROM_START = 1  # what is left, at a token, of the memory that the chunk starts with
TO_END = 2  # what is left, at the end of the chunk, of what a token writes
SCALES = 3
# The last three are read along columns too. The sum of the log decays from the start of the chunk is two numbers, a
# multiple of 1/256 and the rest: the first's differences are exact beside resets, and the second's are small.
COARSE, FINE = 3, 4
SEGMENT = 5  # how often the memory has restarted since the start of the chunk
GATES = 6
PAIR_ROWS = 3

# The least log decay that kernels are given; its exp is 0, as is that of anything below -104. With it the sums of 64
# tokens stay within 2^16, up to which multiples of 1/256 are exact, so that it adds no error to the decays beside it.
LOWEST = -1000.0


def to_chunks(x: jax.Array) -> jax.Array:
    """[B, T, H] -> [B, H, N, 64]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1, CHUNK)


def from_chunks(x: jax.Array) -> jax.Array:
    """[B, H, N, 64] -> [B, T, H]."""
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


def pad_to_multiple(x: jax.Array, multiple: int = CHUNK) -> jax.Array:
    """[B, T, ...] with zeros after the last token, up to a multiple of tokens."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def segments_of(resets: jax.Array) -> jax.Array:
    """Return the number of resets since the start of the chunk [B, N, 64] float32, from resets [B, T] bool."""
    in_chunks = resets.astype(jnp.int32).reshape(resets.shape[0], -1, CHUNK)
    return jnp.cumsum(in_chunks, axis=-1).astype(jnp.float32)


def clamped(log_decay: jax.Array) -> jax.Array:
    """Log decays of at least `LOWEST`, in place of resets down to -inf, which get no gradient. NaN stays NaN."""
    return jnp.where(log_decay < LOWEST, LOWEST, log_decay)


def two_sums(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log decays [..., 64] summed from the start, as a multiple of 1/256 and the rest."""
    coarse = jnp.round(log_decay * 256.0) / 256.0
    return jnp.cumsum(coarse, axis=-1), jnp.cumsum(log_decay - coarse, axis=-1)


def pair_rows_of(gates: Any) -> Any:
    """The rows of the gates of a chunk that are read along columns, [PAIR_ROWS, 64]."""
    return gates.at[pl.ds(GATES - PAIR_ROWS, PAIR_ROWS)]


def pair_rows_tile(*stages: int) -> Any:
    """Shared memory for them: the compiler gives one vector one layout, along rows or along columns."""
    return plgpu.SMEM((*stages, PAIR_ROWS, CHUNK), jnp.float32)


def gates_of(beta: jax.Array, log_decay: jax.Array | None, segment: jax.Array | None) -> jax.Array:
    """Return gates [B, H, N, GATES, 64] from beta, a scalar log decay [B, T, H] and segments [B, N, 64] float32."""
    beta = to_chunks(beta)
    ones, zeros = jnp.ones_like(beta), jnp.zeros_like(beta)
    rows = [beta, ones, ones, zeros, zeros, zeros]
    if log_decay is not None:
        coarse, fine = two_sums(to_chunks(log_decay))
        rows[COARSE], rows[FINE] = coarse, fine
        rows[FROM_START] = jnp.exp(coarse + fine)
        rows[TO_END] = jnp.exp((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
    if segment is not None:
        rows[SEGMENT] = jnp.broadcast_to(segment[:, None], beta.shape)
        rows[FROM_START] = jnp.where(rows[SEGMENT] == 0, rows[FROM_START], 0.0)
        rows[TO_END] = jnp.where(rows[SEGMENT] == rows[SEGMENT][..., -1:], rows[TO_END], 0.0)
    return jnp.stack(rows, axis=3)


def pair_decay(gates: Any, pair_rows: Any, *, decay: bool, resets: bool) -> jax.Array:
    """What is left at token i of what token j <= i wrote, else 0: [64, 64].

    Args:
        gates: of the chunk [GATES, 64], in shared memory.
        pair_rows: its rows that are also read along columns, `pair_rows_of(gates)`, in shared memory.
        decay: apply the scalar decay of COARSE and FINE.
        resets: keep only pairs of one segment.
    """
    i, j = indices((CHUNK, CHUNK))
    keep = i >= j
    left = jnp.where(keep, 1.0, 0.0)
    if resets:
        left = jnp.where(row_scale(gates.at[SEGMENT], left) == _column(pair_rows, SEGMENT, left), left, 0.0)
    if decay:
        # Above the diagonal the difference is positive and may overflow: it is cut before it is exponentiated.
        sums = row_scale(gates.at[COARSE], left) - _column(pair_rows, COARSE, left)
        sums = sums + (row_scale(gates.at[FINE], left) - _column(pair_rows, FINE, left))
        left = left * jnp.exp(jnp.where(keep, sums, 0.0))
    return left


def _column(pair_rows: Any, row: int, like: jax.Array) -> jax.Array:
    return column_scale(pair_rows.at[row - (GATES - PAIR_ROWS)], like)
