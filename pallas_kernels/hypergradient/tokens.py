"""One token of the hypergradient preconditioner after the other, with the projection, and the adjoint of each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK
from pallas_kernels.hypergradient.chunk import BETA, BLOCK, DRAW, FORGET, RESTART, STEP, Static


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
