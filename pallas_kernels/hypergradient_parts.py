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

from pallas_kernels.gates import to_chunks, two_sums
from pallas_kernels.tiles import CHUNK, column_scale, indices, products, read, row_scale, smem, split, split_terms

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


def load_row(ref: Any) -> jax.Array:
    """All channels [K] as float32, over the lanes of every warp: each warp has them all and sums without a barrier."""
    return plgpu.load(ref, layout=_row(ref.shape[0])).astype(jnp.float32)


def no_row(size: int) -> jax.Array:
    """Zeros for all channels."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _row(size))


def _row(size: int) -> Any:
    each = min(4, size // 32)
    tiling = plgpu.Tiling(((32 * each,), (each,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1)


def outside(d: jax.Array, static: Static) -> jax.Array:
    """1 where a value leaves the bounds or is none, else 0."""
    lo, hi = static.bounds or (-jnp.inf, jnp.inf)
    return jnp.where((d >= lo) & (d <= hi), 0.0, 1.0)


def update(d: jax.Array, u: jax.Array, gate: Any, anchor: Any, static: Static) -> tuple[jax.Array, Any, Any]:
    """(d after a token, not yet projected, <d, u>, feedback) for a row d [K]; gate(row) is a number of that token."""
    predicted = jnp.sum(d * u)
    feedback = 1.0 - gate(BETA) * predicted
    after = d
    if static.forget:
        after = gate(FORGET) * after
        if static.anchored:
            after = after + gate(DRAW) * load_row(anchor)
    return after + (gate(STEP) * feedback) * u, predicted, feedback


def token_by_token(
    d: jax.Array,
    rows: Any,
    gates: Any,
    restart: Any,
    anchor: Any,
    block: Any,
    loaded: Any,
    *,
    static: Static,
    write: Any = None,
) -> jax.Array:
    """Takes a row d [K] through the tokens of a chunk, with the projection.

    Args:
        d: before the first.
        rows: the place of the first row -> the reference to the keys of `BLOCK` tokens.
        gates: of the chunk.
        restart, anchor: [K], in shared memory.
        block: shared memory for the keys of `BLOCK` tokens.
        loaded: a barrier for them.
        static: the options.
        write: is given the place of each token, its key and the d that it uses, both [K].
    """

    def tokens(m: Any, d: jax.Array) -> jax.Array:
        plgpu.commit_smem()  # all have read the rows of the block before
        plgpu.copy_gmem_to_smem(rows(m * BLOCK), block, loaded)
        plgpu.barrier_wait(loaded)

        def token(i: Any, d: jax.Array) -> jax.Array:
            gate = lambda row: gates[row, m * BLOCK + i]
            if static.documents:
                d = restarted(gate(RESTART), restart, d)
            key = load_row(block.at[i])
            if write is not None:
                write(m * BLOCK + i, key, d)
            return project(update(d, key * key, gate, anchor, static)[0], static)

        return lax.fori_loop(0, BLOCK, token, d)

    return lax.fori_loop(0, CHUNK // BLOCK, tokens, d)


def restarted(starts: Any, state: Any, d: jax.Array) -> jax.Array:
    """d, or where a document starts what documents start from."""
    return jnp.where(jnp.broadcast_to(starts > 0.0, d.shape), load_row(state), d)


def stopped(starts: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cotangent of the state that a token sees as that of the state before it and that of documents' start."""
    starts = jnp.broadcast_to(starts > 0.0, cotangent.shape)
    return jnp.where(starts, 0.0, cotangent), jnp.where(starts, cotangent, 0.0)


def project(d: jax.Array, static: Static) -> jax.Array:
    """Clips to the bounds."""
    if static.bounds is None:
        return d
    lo, hi = static.bounds
    return jnp.where(d < lo, lo, jnp.where(d > hi, hi, d))


def unprojected(cotangent: jax.Array, after: jax.Array, static: Static) -> jax.Array:
    """The cotangent of what was projected. A value on a bound passes its gradient on."""
    if static.bounds is None:
        return cotangent
    lo, hi = static.bounds
    return jnp.where(after < lo, 0.0, jnp.where(after > hi, 0.0, cotangent))


class Pulled(NamedTuple):
    """The adjoint of one token."""

    before: jax.Array  # cotangent of the state before the token [K]
    after: jax.Array  # of the state after it, before the projection [K]
    coefficient: Any  # of step * feedback
    predicted: Any
    feedback: Any


def pull(
    cotangent: jax.Array, used: jax.Array, d: jax.Array, u: jax.Array, gate: Any, anchor: Any, static: Static
) -> Pulled:
    """Pulls the cotangent of the state after a token, and that of the d that the token uses, back to before it."""
    after, predicted, feedback = update(d, u, gate, anchor, static)
    after = unprojected(cotangent, after, static)
    coefficient = jnp.sum(after * u)
    before = gate(FORGET) * after if static.forget else after
    before = before + used - (gate(BETA) * gate(STEP) * coefficient) * u
    return Pulled(before, after, coefficient, predicted, feedback)


def blocks(size: int, key: Any, cotangent: Any) -> list[Any]:
    """Shared memory for rows of k, d and what comes in, of `BLOCK` tokens."""
    return [plgpu.SMEM((BLOCK, size), dtype) for dtype in (key, jnp.float32, cotangent)]


def reversed_tokens(rows: Any, blocks: Any, loaded: Any, step: Any, carry: Any) -> Any:
    """Folds step(t, rows of the token, carry) over the tokens of a chunk, the last first.

    Args:
        rows: the place of the first row -> the references to a block of rows of tokens.
        blocks: shared memory for them, [tokens of a block, K] each.
        loaded: a barrier that expects as many copies.
        step: see above.
        carry: what it starts from.
    """

    length = blocks[0].shape[0]

    def block(reverse: Any, carry: Any) -> Any:
        first = CHUNK - length - reverse * length
        plgpu.commit_smem()  # all have read the rows of the block before
        for source, target in zip(rows(first), blocks, strict=True):
            plgpu.copy_gmem_to_smem(source, target, loaded)
        plgpu.barrier_wait(loaded)

        def token(reverse: Any, carry: Any) -> Any:
            i = length - 1 - reverse
            return step(first + i, [target.at[i] for target in blocks], carry)

        return lax.fori_loop(0, length, token, carry)

    return lax.fori_loop(0, CHUNK // length, block, carry)
