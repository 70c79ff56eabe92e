"""What the kernels of the hypergradient preconditioner share: gates of a chunk, squared keys, one token.

With u = k^2, o = d - anchor and g_t = exp(log_forget_t), a chunk that starts from o and leaves no bound is

    (I + L) feedback = 1 - beta (lead <u, o> + <u, anchor>)     L_ij = beta_i E_ij <u_i, u_j> step_j,  i > j
    d_i = anchor + lead_i o + sum_{j < i} E_ij c_j u_j          c = step * feedback

where E_ij is what is left before token i of what token j added, and lead_i of the start. A chunk that leaves them, or
that a document starts inside of, is done token by token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import CHUNK, column_scale, indices, read, row_scale, smem

# Rows of the gates of a chunk, [GATES, 64] float32. The sums of log_forget are each kept as two numbers, a multiple of
# 1/256 and the rest: the first's differences are exact beside strong forgetting, and the second's are small.
STEP, BETA, FORGET, DRAW, RESTART, FORCED = range(6)
LEAD, TO_END, COARSE, FINE, COARSE_BEFORE, FINE_BEFORE = range(6, 12)
GATES = 12

PIECE = 64  # channels that a kernel holds in registers at once
BLOCK = 16  # tokens whose rows lie in shared memory at once, token by token

_ROWS = plgpu.Layout.WGMMA.reduce(1)
VECTOR = plgpu.Layout.WGMMA.reduce(0)  # of rows of channels; every warp holds them all, so that sums need no barrier


class Static(NamedTuple):
    """What is fixed when a kernel is built."""

    bounds: tuple[float, float] | None
    forget: bool
    anchored: bool
    documents: bool
    interpret: bool

    @property
    def exact(self) -> bool:
        """Whether a chunk may have to be done token by token."""
        return self.bounds is not None or self.documents


def make_gates(step: jax.Array, beta: jax.Array, log_forget: jax.Array, restart: jax.Array) -> jax.Array:
    """[B, P, N, GATES, 64] of step, beta and log_forget [B, T, P] and restart [B, T], float32, T a multiple of 64."""

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, CHUNK)

    forget = chunks(jnp.maximum(log_forget, -110.0))  # its exp is 0, as is that of anything below
    coarse = jnp.round(forget * 256.0) / 256.0
    fine = forget - coarse
    coarse_sum, fine_sum = jnp.cumsum(coarse, axis=-1), jnp.cumsum(fine, axis=-1)
    coarse_before, fine_before = coarse_sum - coarse, fine_sum - fine
    to_end = (coarse_sum[..., -1:] - coarse_sum) + (fine_sum[..., -1:] - fine_sum)
    restarts = chunks(jnp.broadcast_to(restart[..., None], step.shape))
    forced = jnp.broadcast_to(jnp.max(restarts[..., 1:], axis=-1, keepdims=True), restarts.shape)
    rows = [
        *(chunks(step), chunks(beta), jnp.exp(forget), -jnp.expm1(forget), restarts, forced),
        *(jnp.exp(coarse_before + fine_before), jnp.exp(to_end)),
        *(coarse_sum, fine_sum, coarse_before, fine_before),
    ]
    return jnp.stack(rows, axis=3)


def left_before(gates: Any, again: Any, static: Static) -> jax.Array:
    """E [64, 64]: what is left before token i of what token j < i added. The gates lie in shared memory twice, since
    the compiler gives one vector one layout: along rows or along columns."""
    i, j = indices((CHUNK, CHUNK))
    left = jnp.where(i > j, 1.0, 0.0)
    if not static.forget:
        return left
    sums = row_scale(gates.at[COARSE_BEFORE], left) - column_scale(again.at[COARSE], left)
    sums = sums + (row_scale(gates.at[FINE_BEFORE], left) - column_scale(again.at[FINE], left))
    return left * jnp.exp(jnp.where(i > j, sums, 0.0))


def left_after(gates: Any, again: Any, static: Static) -> jax.Array:
    """The transpose of E: what is left before token j of what token i < j added."""
    i, j = indices((CHUNK, CHUNK))
    left = jnp.where(i < j, 1.0, 0.0)
    if not static.forget:
        return left
    sums = column_scale(again.at[COARSE_BEFORE], left) - row_scale(gates.at[COARSE], left)
    sums = sums + (column_scale(again.at[FINE_BEFORE], left) - row_scale(gates.at[FINE], left))
    return left * jnp.exp(jnp.where(i < j, sums, 0.0))


def halves(pieces: int) -> list[Any]:
    """Shared memory for a float32 matrix [64, pieces * 64] as the sum of two bfloat16 ones: 16 bits of its 24."""
    return [smem(pieces, CHUNK, PIECE, dtype=jnp.bfloat16)] * 2


def at(pair: Sequence[Any], piece: Any) -> list[Any]:
    """A piece [64, 64] of both halves."""
    return [half.at[piece] for half in pair]


def split(value: jax.Array, pair: Sequence[Any]) -> None:
    """Writes float32 registers as two halves."""
    high = value.astype(jnp.bfloat16)
    pair[0][...] = high
    pair[1][...] = (value - high.astype(jnp.float32)).astype(jnp.bfloat16)


def terms(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The products of halves that make a @ b."""
    return [(a[0], b[0]), (a[0], b[1]), (a[1], b[0])]


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


def load_rows(ref: Any) -> jax.Array:
    """One number per token of a chunk."""
    return plgpu.load(ref, layout=_ROWS)


def along_rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """One number per token, in registers, broadcast along the columns of an accumulator."""
    return plgpu.layout_cast(lax.broadcast_in_dim(values, like.shape, [0]), plgpu.Layout.WGMMA)


def load_vector(ref: Any) -> jax.Array:
    """A row of channels as float32 registers."""
    return plgpu.load(ref, layout=VECTOR).astype(jnp.float32)


def square_row(ref: Any) -> jax.Array:
    """u of one token, [K]."""
    k = load_vector(ref)
    return k * k


def vector(size: int) -> jax.Array:
    """A row of zeros."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), VECTOR)


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
            after = after + gate(DRAW) * load_vector(anchor)
    return after + (gate(STEP) * feedback) * u, predicted, feedback


def restarted(starts: Any, state: Any, d: jax.Array) -> jax.Array:
    """d, or where a document starts what documents start from."""
    return jnp.where(jnp.broadcast_to(starts > 0.0, d.shape), load_vector(state), d)


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
