"""The part of a chunk that needs no memory: its scores and the inverse that solves it. Parallel over all chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import (
    BETA,
    GATES,
    TO_END,
    pair_decay,
    pair_rows_of,
    pair_rows_tile,
)
from pallas_kernels.common.inverse import SCRATCH as INVERSE
from pallas_kernels.common.inverse import times_inverse, unit_lower_inverse
from pallas_kernels.common.launch import launch
from pallas_kernels.common.tiles import CHUNK, product, products, row_scale, smem, split


class DeltaRuleOptions(NamedTuple):
    """Options that are fixed when a kernel is built."""

    scale: float
    erase: bool
    decay: bool  # scalar decay: the gates COARSE and FINE hold its sum since the start of the chunk
    resets: bool  # the gate SEGMENT counts the resets since the start of the chunk
    interpret: bool
    splits: int | None = None  # of the sequence; None: chosen by `split_count`

    @property
    def gated(self) -> bool:
        """Return True if FROM_START or TO_END can differ from 1."""
        return self.decay or self.resets


class Chunks(NamedTuple):
    """What the recurrences read: all of every chunk that needs no memory."""

    q: jax.Array  # [B, T, Hk, K]; where decay is per channel, decayed from the start of its chunk [B, T, H, K]
    k: jax.Array  # likewise
    w: jax.Array  # [B, T, Hw, K]; likewise, decayed to the end of its chunk
    gates: jax.Array  # [B, H, N, GATES, 64] float32
    carry: jax.Array | None  # what a chunk keeps of the memory, per channel [B, H, N, K]; None: FROM_START's last
    scores: jax.Array  # P (I + A)^-1, or P without erase [B, H, N, 64, 64]
    solved: jax.Array | None  # (I + A)^-T times w, decayed to the end [B, T, H, K]; None without erase
    inverse: list[jax.Array]  # (I + A)^-1 [B, H, N, 64, 64] and what rounding takes off it; only for a gradient


def prepare(
    q: jax.Array, k: jax.Array, w: jax.Array, gates: jax.Array, options: DeltaRuleOptions, *, gradient: bool
) -> Chunks:
    """The chunks without a decay or under a scalar one.

    A_ij = beta_i <k_i, w_j> decay_ij below the diagonal and P_ij = scale <q_i, w_j> decay_ij on and below it. Beside
    near-parallel keys P and w have nearly equal rows, whose small differences count: they are multiplied by the inverse
    in float32's order of precision, and only the products are rounded.

    Args:
        q, k: [B, T, Hk, K], T a multiple of 64.
        w: [B, T, Hw, K].
        gates: [B, H, N, GATES, 64].
        options: fixed options of the kernels.
        gradient: whether to return the inverse.
    """
    batch, length, key_heads, key_dim = q.shape
    heads, count = gates.shape[1:3]
    invert = options.erase and gradient
    square = jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), q.dtype)
    out = [square]
    out += [jax.ShapeDtypeStruct((batch, length, heads, key_dim), q.dtype)] * options.erase
    out += [square] * (2 * invert)

    def body(at: Any, q_ref: Any, k_ref: Any, w_ref: Any, gates_ref: Any, *refs: Any) -> None:
        (scores_ref, *solution_refs), refs = refs[: len(out)], refs[len(out) :]
        w_s, shared, gates_s, pair_rows_s, loaded = refs
        (q_s, k_s), inverse_s, (p_s, x_s) = shared
        b, h, n = at("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)
        key_head, write_head = lax.div(h, heads // key_heads), lax.div(h, heads // w.shape[2])
        plgpu.copy_gmem_to_smem(q_ref.at[b, rows, key_head], q_s, loaded)
        plgpu.copy_gmem_to_smem(w_ref.at[b, rows, write_head], w_s, loaded)
        plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates_s, loaded)
        plgpu.copy_gmem_to_smem(pair_rows_of(gates_ref.at[b, h, n]), pair_rows_s, loaded)
        if options.erase:
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, key_head], k_s, loaded)
        plgpu.barrier_wait(loaded)
        decay = pair_decay(gates_s, pair_rows_s, decay=options.decay, resets=options.resets)
        if options.erase:
            scores, lower = products([(q_s, w_s.T)], [(k_s, w_s.T)])
            lower = lower * decay
            scores = scores * (decay * options.scale)
            plgpu.commit_smem()  # queries and read keys have served
            inverse = unit_lower_inverse(lower * row_scale(gates_s.at[BETA], lower), inverse_s)
            scores = times_inverse(scores, inverse_s)
            # The scale goes on the inverse's rows, in float32, and not on those of w.
            until_end = inverse * row_scale(gates_s.at[TO_END], inverse) if options.gated else inverse
            plgpu.commit_smem()  # the inverse's memory has served
            split(until_end, x_s.at[0], x_s.at[1])
        else:
            scores = product(q_s, w_s.T) * (decay * options.scale)
            plgpu.commit_smem()
        p_s[...] = scores.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(p_s, scores_ref.at[b, h, n])
        if options.erase:
            (solved,) = products([(x_s.at[0].T, w_s), (x_s.at[1].T, w_s)])
            plgpu.commit_smem()  # so have write keys
            w_s[...] = solved.astype(q.dtype)
            if invert:
                split(inverse, x_s.at[0], x_s.at[1])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(w_s, solution_refs[0].at[b, rows, h])
        for half in range(2 * invert):
            plgpu.copy_smem_to_gmem(x_s.at[half], solution_refs[1 + half].at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    keys, square = smem(CHUNK, key_dim, dtype=q.dtype), smem(CHUNK, CHUNK, dtype=q.dtype)
    # One after the other: what is read, what the inverse works in, what is written. So an H200 holds two blocks.
    shared = plgpu.RefUnion([keys, keys], INVERSE, [square, smem(2, CHUNK, CHUNK, dtype=q.dtype)])
    scratch = [
        keys,
        shared,
        plgpu.SMEM((GATES, CHUNK), jnp.float32),
        pair_rows_tile(),
        plgpu.Barrier(num_arrivals=4 + options.erase),
    ]
    grid = {"batch": batch, "chunk": count, "head": heads}
    results = launch(body, "delta_rule_prepare", out, grid, scratch, options.interpret, [q, k, w, gates])
    scores, solved = (*results, None)[:2]
    return Chunks(q, k, w, gates, None, scores, solved, results[2:])
