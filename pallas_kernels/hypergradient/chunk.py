"""A chunk of the hypergradient preconditioner in closed form: its gates, its decays, d before each token.

With u = k^2, o = d - anchor before the chunk and c = step * feedback, a chunk whose values stay within the bounds is

    (I + L) feedback = 1 - beta (decay <u, o> + <u, anchor>)     L_ij = beta_i E_ij <u_i, u_j> step_j,  i > j
    d_i = anchor + decay_i o + sum_{j < i} E_ij c_j u_j

where E_ij is the product of exp(log_forget) over the tokens between j and i, and decay_i over the tokens of the chunk
before i. A chunk in which a value leaves the bounds, or with a reset after its first token, is recomputed token by
token (`tokens.py`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
    column_scale,
    indices,
    products,
    read,
    row_scale,
    smem,
    split,
    split_terms,
)
from pallas_kernels.common.token_gates import to_chunks, two_sums

# Rows of the gates of a chunk, [GATES, 64] float32.
STEP, BETA = 0, 1
FORGET = 2  # exp(log_forget)
ANCHOR_WEIGHT = 3  # 1 - exp(log_forget)
RESET = 4  # 1 if the state is reset before the token
RESET_INSIDE = 5  # 1 in the whole chunk if it has a reset after its first token
DECAY_BEFORE = 6  # decay from the start of the chunk to before the token
TO_END = 7  # decay from the token to the end of the chunk
SUMS = (8, 9, 10, 11)  # of log_forget, up to and before the token, each as the two terms of `two_sums`
COARSE, FINE, COARSE_BEFORE, FINE_BEFORE = SUMS
GATES = 12

SCAN_SLAB = 128  # channels that the scans over chunks hold in registers at once

_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


class HypergradientOptions(NamedTuple):
    """Options that are fixed when a kernel is built."""

    bounds: tuple[float, float] | None
    forget: bool
    anchored: bool
    resets: bool
    return_write_key: bool  # return write keys d k, in the type of k, instead of d in float32
    interpret: bool

    @property
    def may_run_sequentially(self) -> bool:
        """True if a chunk may have to be computed token by token."""
        return self.bounds is not None or self.resets


class Chunks(NamedTuple):
    """All chunks as the forward pass leaves them, for `expand` and the gradient."""

    k: jax.Array  # [B, T, P, K], T a multiple of 64
    gates: jax.Array  # [B, P, N, GATES, 64] float32
    start: jax.Array  # d before each chunk [B, P, N, K] float32
    feedback: jax.Array  # of each token [B, P, N, 64] float32, undefined in sequential chunks
    sequential: jax.Array  # 1 for chunks that are computed token by token, else 0 [B, P, N] int32
    after_reset: jax.Array  # d after a reset [B, P, K] float32
    anchor: jax.Array  # [B, P, K] float32


def sum_rows_tile() -> Any:
    """Return the type of a second copy of the sums of the gates in shared memory.

    The compiler gives a vector one layout, along rows or along columns: the sums are read along rows from the gates and
    along columns from this copy.
    """
    return plgpu.SMEM((len(SUMS), CHUNK), jnp.float32)


def sum_rows_of(gates: Any) -> Any:
    """Return the sums in the gates of a chunk."""
    return gates.at[pl.ds(SUMS[0], len(SUMS))]


def make_gates(step: jax.Array, beta: jax.Array, log_forget: jax.Array | None, resets: jax.Array | None) -> jax.Array:
    """Return the gates [B, P, N, GATES, 64] of all chunks, T a multiple of 64, from float32 arrays.

    Args:
        step: [B, T, P].
        beta: [B, T, P].
        log_forget: [B, T, P], or None.
        resets: [B, T], 1 or 0, or None.
    """
    step, beta = to_chunks(step), to_chunks(beta)
    ones, zeros = jnp.ones_like(step), jnp.zeros_like(step)
    # An absent log_forget is not summed as zeros: XLA would fold the sum, which takes minutes for long sequences.
    reset = reset_inside = zeros
    if resets is not None:
        reset = to_chunks(jnp.broadcast_to(resets[..., None], (*resets.shape, step.shape[1])))
        reset_inside = jnp.broadcast_to(jnp.max(reset[..., 1:], axis=-1, keepdims=True), reset.shape)
    if log_forget is None:
        return jnp.stack([step, beta, ones, zeros, reset, reset_inside, ones, ones, *[zeros] * len(SUMS)], axis=3)
    forget = to_chunks(log_forget)
    coarse_sum, fine_sum = two_sums(forget)
    coarse_before, fine_before = (_exclusive(sums) for sums in (coarse_sum, fine_sum))
    to_end = (coarse_sum[..., -1:] - coarse_sum) + (fine_sum[..., -1:] - fine_sum)
    rows = [
        *(step, beta, jnp.exp(forget), -jnp.expm1(forget), reset, reset_inside),
        *(jnp.exp(coarse_before + fine_before), jnp.exp(to_end)),
        *(coarse_sum, fine_sum, coarse_before, fine_before),
    ]
    return jnp.stack(rows, axis=3)


def _exclusive(sums: jax.Array) -> jax.Array:
    """Return inclusive sums [..., 64] without the term of the token itself."""
    return jnp.pad(sums[..., :-1], [(0, 0)] * (sums.ndim - 1) + [(1, 0)])


def decay_between(gates: Any, sum_rows: Any, options: HypergradientOptions) -> jax.Array:
    """Return E [64, 64]: the decay from token j < i to before token i, else 0.

    Args:
        gates: of the chunk, in shared memory.
        sum_rows: second copy of their sums (`sum_rows_tile`).
        options: of the kernel.
    """
    i, j = indices((CHUNK, CHUNK))
    keep = jnp.where(i > j, 1.0, 0.0)
    if not options.forget:
        return keep
    sums = row_scale(gates.at[COARSE_BEFORE], keep) - _column(sum_rows, COARSE, keep)
    sums = sums + (row_scale(gates.at[FINE_BEFORE], keep) - _column(sum_rows, FINE, keep))
    return keep * jnp.exp(jnp.where(i > j, sums, 0.0))


def decay_between_transposed(gates: Any, sum_rows: Any, options: HypergradientOptions) -> jax.Array:
    """Return the transpose of `decay_between`."""
    i, j = indices((CHUNK, CHUNK))
    keep = jnp.where(i < j, 1.0, 0.0)
    if not options.forget:
        return keep
    sums = _column(sum_rows, COARSE_BEFORE, keep) - row_scale(gates.at[COARSE], keep)
    sums = sums + (_column(sum_rows, FINE_BEFORE, keep) - row_scale(gates.at[FINE], keep))
    return keep * jnp.exp(jnp.where(i < j, sums, 0.0))


def _column(sum_rows: Any, row: int, like: jax.Array) -> jax.Array:
    """Return a row of the sums along the columns of an accumulator."""
    return column_scale(sum_rows.at[row - SUMS[0]], like)


def halves_tile(slabs: int = 1) -> Any:
    """Return the type of a float32 matrix [64, 64] per slab in shared memory.

    Each is the sum of two bfloat16 ones, which hold 16 of its 24 bits.
    """
    return smem(slabs, 2, CHUNK, SLAB, dtype=jnp.bfloat16)


def halves_of(matrices: Any, slab: Any = 0) -> list[Any]:
    """Return the two halves of one of several matrices."""
    return [matrices.at[slab, half] for half in range(2)]


def fold_slabs(count: int, step: Any, carry: Any) -> Any:
    """Fold step(slab, carry) over slabs of channels, in a loop: unrolled it takes too many registers."""
    return step(0, carry) if count == 1 else lax.fori_loop(0, count, step, carry)


def channels(slab: Any, width: int = SLAB) -> Any:
    """Return the channels of a slab."""
    return pl.ds(slab * width, width)


def squares(tile: Any) -> jax.Array:
    """Return u of a tile [64, channels] of keys."""
    k = read(tile)
    return k * k


def read_transposed(tile: Any) -> jax.Array:
    """Return a tile [64, channels] as float32 registers [channels, 64]: a sum over tokens then stays within a warp."""
    return plgpu.load(tile.T, layout=_TRANSPOSED).astype(jnp.float32)


def squares_transposed(tile: Any) -> jax.Array:
    """Return u of a tile [64, channels] of keys as `read_transposed` registers."""
    k = read_transposed(tile)
    return k * k


def read_by_channel(vector: Any) -> jax.Array:
    """Return a vector in shared memory as registers, one element per row of `read_transposed` ones."""
    return plgpu.load(vector, layout=_TRANSPOSED.reduce(1))


def read_by_token(vector: Any) -> jax.Array:
    """Return a vector in shared memory as registers, one element per column of `read_transposed` ones."""
    return plgpu.load(vector, layout=_TRANSPOSED.reduce(0))


def zero_channels(size: int) -> jax.Array:
    """Return zeros in the layout of `read_by_channel`."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _TRANSPOSED.reduce(1))


def sum_over_tokens(matrix: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the weighted sum over tokens of a `read_transposed` matrix [channels, 64], with weights [64]."""
    weights = plgpu.layout_cast(lax.broadcast_in_dim(weights, matrix.shape, [1]), _TRANSPOSED)
    return jnp.sum(matrix * weights, axis=1)


def write_weights(feedback: Any, gates: Any, sum_rows: Any, weights: Any, options: HypergradientOptions) -> None:
    """Write the weights E_ij c_j into the two halves `weights`."""
    decay = decay_between(gates, sum_rows, options)
    decay = decay * column_scale(feedback, decay) * column_scale(gates.at[STEP], decay)
    split(decay, *weights)


def closed_form(
    keys: Any, start: Any, anchor: Any, gates: Any, u: Any, weights: Any, options: HypergradientOptions
) -> jax.Array:
    """Return d before every token of a chunk [64, 64] for a slab of channels, without the projection.

    `scan` tests these values against the bounds and `expand` writes them. Both call this function, so that the values
    are the same to the last bit.

    Args:
        keys: slab of the keys, in shared memory.
        start: slab of d before the chunk, in shared memory.
        anchor: slab of the anchor, in shared memory.
        gates: of the chunk, in shared memory.
        u: the two halves of a matrix in shared memory, overwritten with the squared keys.
        weights: the two halves that `write_weights` wrote.
        options: of the kernel.
    """
    split(squares(keys), *u)
    plgpu.commit_smem()
    values = products(split_terms(weights, u))[0]
    origin = column_scale(start, values)
    if options.anchored:
        origin = origin - column_scale(anchor, values)
    if options.forget:
        origin = origin * row_scale(gates.at[DECAY_BEFORE], values)
    values = values + origin
    return values + column_scale(anchor, values) if options.anchored else values
