"""What the kernels of the hypergradient preconditioner share: gates of a chunk, squared keys, one token.

With u = k^2, o = d - anchor and g_t = exp(log_forget_t), a chunk that starts from o and leaves no bound is

    (I + L) feedback = 1 - beta (lead <u, o> + <u, anchor>)     L_ij = beta_i E_ij <u_i, u_j> step_j,  i > j
    d_i = anchor + lead_i o + sum_{j < i} E_ij c_j u_j          c = step * feedback

where E_ij is what is left before token i of what token j added, and lead_i of the start. A chunk that leaves them, or
that a document starts inside of, is done token by token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import to_chunks, two_sums
from pallas_kernels.common.tiles import (
    CHUNK,
    column_scale,
    indices,
    products,
    read,
    row_scale,
    smem,
    split,
    split_terms,
)

# Rows of the gates of a chunk, [GATES, 64] float32. The sums of log_forget are each kept as two numbers, of `two_sums`.
STEP, BETA, FORGET, DRAW, RESTART, FORCED = range(6)
LEAD, TO_END, *SUMS = range(6, 12)
COARSE, FINE, COARSE_BEFORE, FINE_BEFORE = SUMS
GATES = 12

PIECE = 64  # channels that a kernel holds in registers at once
WIDTH = 128  # and those that take the state from chunk to chunk
BLOCK = 16  # tokens whose rows lie in shared memory at once, token by token

_TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


class Static(NamedTuple):
    """What is fixed when a kernel is built."""

    bounds: tuple[float, float] | None
    forget: bool
    anchored: bool
    documents: bool
    multiply: bool  # whether the result is write keys d k, in the type of k, or d in float32
    interpret: bool

    @property
    def exact(self) -> bool:
        """Whether a chunk may have to be done token by token."""
        return self.bounds is not None or self.documents


def again_tile(*stages: int) -> Any:
    """Shared memory for the sums of the gates."""
    return plgpu.SMEM((*stages, len(SUMS), CHUNK), jnp.float32)


def sums_of(gates: Any) -> Any:
    """The sums in the gates of a chunk."""
    return gates.at[pl.ds(SUMS[0], len(SUMS))]


def make_gates(step: jax.Array, beta: jax.Array, log_forget: jax.Array | None, restart: jax.Array | None) -> jax.Array:
    """[B, P, N, GATES, 64] of step, beta and log_forget [B, T, P] and restart [B, T], float32, T a multiple of 64."""
    step, beta = to_chunks(step), to_chunks(beta)
    ones, zeros = jnp.ones_like(step), jnp.zeros_like(step)
    # What is absent is not summed as zeros: the compiler would do that itself, for minutes where sequences are long.
    restarts = forced = zeros
    if restart is not None:
        restarts = to_chunks(jnp.broadcast_to(restart[..., None], (*restart.shape, step.shape[1])))
        forced = jnp.broadcast_to(jnp.max(restarts[..., 1:], axis=-1, keepdims=True), restarts.shape)
    if log_forget is None:
        return jnp.stack([step, beta, ones, zeros, restarts, forced, ones, ones, *[zeros] * len(SUMS)], axis=3)
    forget = to_chunks(log_forget)
    coarse_sum, fine_sum = two_sums(forget)
    coarse_before, fine_before = (_before(sums) for sums in (coarse_sum, fine_sum))
    to_end = (coarse_sum[..., -1:] - coarse_sum) + (fine_sum[..., -1:] - fine_sum)
    rows = [
        *(step, beta, jnp.exp(forget), -jnp.expm1(forget), restarts, forced),
        *(jnp.exp(coarse_before + fine_before), jnp.exp(to_end)),
        *(coarse_sum, fine_sum, coarse_before, fine_before),
    ]
    return jnp.stack(rows, axis=3)


def _before(sums: jax.Array) -> jax.Array:
    """Sums [..., 64] without each token's own term."""
    return jnp.pad(sums[..., :-1], [(0, 0)] * (sums.ndim - 1) + [(1, 0)])


def left_before(gates: Any, again: Any, static: Static) -> jax.Array:
    """E [64, 64]: what is left before token i of what token j < i added.

    The sums lie in shared memory twice, in the gates and in `again`, since the compiler gives one vector one layout:
    along rows or along columns.
    """
    i, j = indices((CHUNK, CHUNK))
    left = jnp.where(i > j, 1.0, 0.0)
    if not static.forget:
        return left
    sums = row_scale(gates.at[COARSE_BEFORE], left) - _column(again, COARSE, left)
    sums = sums + (row_scale(gates.at[FINE_BEFORE], left) - _column(again, FINE, left))
    return left * jnp.exp(jnp.where(i > j, sums, 0.0))


def left_after(gates: Any, again: Any, static: Static) -> jax.Array:
    """The transpose of E: what is left before token j of what token i < j added."""
    i, j = indices((CHUNK, CHUNK))
    left = jnp.where(i < j, 1.0, 0.0)
    if not static.forget:
        return left
    sums = _column(again, COARSE_BEFORE, left) - row_scale(gates.at[COARSE], left)
    sums = sums + (_column(again, FINE_BEFORE, left) - row_scale(gates.at[FINE], left))
    return left * jnp.exp(jnp.where(i < j, sums, 0.0))


def _column(again: Any, row: int, like: jax.Array) -> jax.Array:
    return column_scale(again.at[row - SUMS[0]], like)


def halves(pieces: int) -> Any:
    """Shared memory for float32 matrices [64, 64], each as the sum of two bfloat16 ones: 16 bits of its 24."""
    return smem(pieces, 2, CHUNK, PIECE, dtype=jnp.bfloat16)


def at(matrices: Any, piece: Any) -> list[Any]:
    """Both halves of one of several matrices."""
    return [matrices.at[piece, half] for half in range(2)]


def over(pieces: int, step: Any, start: Any) -> Any:
    """Folds step(piece, carry) over the pieces, one after the other: unrolled they take too many registers."""
    return step(0, start) if pieces == 1 else lax.fori_loop(0, pieces, step, start)


def channels(piece: Any) -> Any:
    """The channels of a piece."""
    return pl.ds(piece * PIECE, PIECE)


def squares(tile: Any) -> jax.Array:
    """u of a piece [64, 64] of keys."""
    k = read(tile)
    return k * k


def transposed(tile: Any) -> jax.Array:
    """A tile [64, channels] as float32 registers [channels, 64]: a sum over tokens stays inside of a warp."""
    return plgpu.load(tile.T, layout=_TRANSPOSED).astype(jnp.float32)


def squares_by_channel(tile: Any) -> jax.Array:
    """u of keys [64, channels], [channels, 64] as `transposed` has it."""
    k = transposed(tile)
    return k * k


def by_channel(vector: Any) -> jax.Array:
    """A vector in shared memory, one number per row of a `transposed` tile."""
    return plgpu.load(vector, layout=_TRANSPOSED.reduce(1))


def by_token(vector: Any) -> jax.Array:
    """A vector in shared memory, one number per column of a `transposed` tile."""
    return plgpu.load(vector, layout=_TRANSPOSED.reduce(0))


def no_channels(size: int) -> jax.Array:
    """Zeros as `by_channel` has them."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _TRANSPOSED.reduce(1))


def over_tokens(matrix: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum along the rows of a `transposed` tile, with a weight per token."""
    weights = plgpu.layout_cast(lax.broadcast_in_dim(weights, matrix.shape, [1]), _TRANSPOSED)
    return jnp.sum(matrix * weights, axis=1)


def weigh(feedback: Any, gates: Any, again: Any, weights: Any, static: Static) -> None:
    """Writes E_ij c_j by halves into weights."""
    left = left_before(gates, again, static)
    left = left * column_scale(feedback, left) * column_scale(gates.at[STEP], left)
    split(left, *weights)


def closed_form(keys: Any, start: Any, anchor: Any, gates: Any, u: Any, weights: Any, static: Static) -> jax.Array:
    """d before every token of a chunk [64, 64] for a piece of keys, without the projection; u takes their squares.

    What another kernel has tested for the bounds is to have the same digits here: both call this.
    """
    split(squares(keys), *u)
    plgpu.commit_smem()
    values = products(split_terms(weights, u))[0]
    origin = column_scale(start, values)
    if static.anchored:
        origin = origin - column_scale(anchor, values)
    if static.forget:
        origin = origin * row_scale(gates.at[LEAD], values)
    values = values + origin
    return values + column_scale(anchor, values) if static.anchored else values
