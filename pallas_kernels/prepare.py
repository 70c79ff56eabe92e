"""The part of a chunk that needs no memory: its scores and the inverse that solves it. Parallel over all chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gates import BETA, CUMULATIVE, DOCUMENT, GATES
from pallas_kernels.inverse import SCRATCH, unit_lower_inverse
from pallas_kernels.tiles import CHUNK, column_scale, indices, launch, product, row_scale, smem


class Static(NamedTuple):
    """What is fixed when a kernel is built."""

    scale: float
    erase: bool
    decay: bool  # scalar decay: CUMULATIVE holds its sum since the start of the chunk
    documents: bool  # DOCUMENT numbers the documents of a chunk from 0
    interpret: bool

    @property
    def gated(self) -> bool:
        """Whether FROM_START and TO_END are anything but ones."""
        return self.decay or self.documents


class Chunks(NamedTuple):
    """What the recurrences read: all of every chunk that needs no memory."""

    q: jax.Array  # [B, T, Hk, K]; where decay is per channel, decayed from the start of its chunk [B, T, H, K]
    k: jax.Array  # likewise
    w: jax.Array  # [B, T, Hw, K]; likewise, decayed to the end of its chunk
    gates: jax.Array  # [B, H, N, GATES, 64] float32
    carry: jax.Array | None  # what a chunk keeps of the memory, per channel [B, H, N, K]; None: FROM_START's last
    inverse: list[jax.Array]  # (I + A)^-1 [B, H, N, 64, 64], rounded, and for 2 halves what that lost; [] without erase
    scores: jax.Array  # P [B, H, N, 64, 64]


def pair_decay(gates: Any, again: Any, static: Static) -> jax.Array:
    """What is left at token i of what token j <= i wrote, else 0: [64, 64].

    The gates lie in shared memory twice, since the compiler gives one vector one layout: along rows or along columns.
    """
    i, j = indices((CHUNK, CHUNK))
    keep = i >= j
    left = jnp.where(keep, 1.0, 0.0)
    if static.documents:
        left = jnp.where(row_scale(gates.at[DOCUMENT], left) == column_scale(again.at[DOCUMENT], left), left, 0.0)
    if static.decay:
        # Above the diagonal the difference is positive and may overflow: it is cut before it is exponentiated.
        sums = row_scale(gates.at[CUMULATIVE], left) - column_scale(again.at[CUMULATIVE], left)
        left = left * jnp.exp(jnp.where(keep, sums, 0.0))
    return left


def prepare(q: jax.Array, k: jax.Array, w: jax.Array, gates: jax.Array, static: Static, *, halves: int) -> Chunks:
    """The chunks without a decay or under a scalar one.

    A_ij = beta_i <k_i, w_j> decay_ij below the diagonal and P_ij = scale <q_i, w_j> decay_ij on and below it.

    Args:
        q, k: [B, T, Hk, K], T a multiple of 64.
        w: [B, T, Hw, K].
        gates: [B, H, N, GATES, 64].
        static: the options.
        halves: 1, or 2 for a gradient.
    """
    inverses = halves if static.erase else 0
    batch, _, key_heads, size = q.shape
    heads, count = gates.shape[1:3]
    out = jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), q.dtype)

    tiles = 9 + inverses  # outputs, tiles and barrier; the scratch of the inverse follows

    def body(q_ref: Any, k_ref: Any, w_ref: Any, gates_ref: Any, *refs: Any) -> None:
        *out_refs, q_s, k_s, w_s, gates_s, again_s, p_s, x_s, loaded = refs[:tiles]
        scratch = refs[tiles:]
        b, h, n = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
        rows = pl.ds(n * CHUNK, CHUNK)
        key_head, write_head = lax.div(h, heads // key_heads), lax.div(h, heads // w.shape[2])
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, key_head], q_s, loaded)
        plgpu.copy_gmem_to_smem(w_ref.at[b, rows, write_head], w_s, loaded)
        plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates_s, loaded)
        plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], again_s, loaded)
        if static.erase:
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, key_head], k_s, loaded)
        plgpu.barrier_wait(loaded)
        decay = pair_decay(gates_s, again_s, static)
        p_s[...] = (product(q_s, w_s.T) * (decay * static.scale)).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(p_s, out_refs[-1].at[b, h, n])
        if static.erase:
            lower = product(k_s, w_s.T) * decay
            lower = lower * row_scale(gates_s.at[BETA], lower)
            inverse = unit_lower_inverse(lower, scratch)
            for half in range(halves):
                rounded = inverse.astype(q.dtype)
                x_s[half, ...] = rounded
                inverse = inverse - rounded.astype(jnp.float32)
            plgpu.commit_smem()
            for half in range(halves):
                plgpu.copy_smem_to_gmem(x_s.at[half], out_refs[half].at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    scratch = [smem(CHUNK, size, dtype=q.dtype)] * 3
    scratch += [plgpu.SMEM((GATES, CHUNK), jnp.float32)] * 2
    scratch += [smem(CHUNK, CHUNK, dtype=q.dtype), smem(halves, CHUNK, CHUNK, dtype=q.dtype)]
    scratch += [plgpu.Barrier(num_arrivals=4 + static.erase)]
    if static.erase:
        scratch += SCRATCH
    grid = {"chunk": count, "head": heads, "batch": batch}
    outs = [out] * (inverses + 1)
    *inverse, scores = launch(body, "delta_rule_prepare", outs, grid, scratch, static.interpret, [q, k, w, gates])
    return Chunks(q, k, w, gates, None, inverse, scores)
