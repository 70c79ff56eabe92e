"""Chunks under a decay per channel: scores, the inverse, and keys and queries decayed to the ends of their chunk.

Pairs of tokens are joined by halving: at level l, each block of 2^(l+1) tokens has a left and a right half, its queries
and read keys decay from the middle and its write keys up to it, so that no factor is above one, and one product of all
64 tokens joins the halves of all blocks. Exponents are sums of log decays, by a product with zeros and ones, and never
differences.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gates import BETA, FROM_START, GATES, TO_END
from pallas_kernels.inverse import SCRATCH, times_inverse, unit_lower_inverse
from pallas_kernels.prepare import Chunks, Static, pair_decay
from pallas_kernels.tiles import (
    CHUNK,
    along_columns,
    indices,
    launch,
    product,
    products,
    read,
    read_global,
    row_scale,
    smem,
    split,
    zeros,
)

_Q, _K, _W = range(3)
PART = 64  # key channels at a time
LEVELS = 6  # of halving, from single tokens to the whole chunk


def from_start_mask() -> jax.Array:
    """[64, 64], 1 where token j's decay lies between the start of the chunk and token i."""
    i, j = indices((CHUNK, CHUNK))
    return jnp.where(j <= i, 1.0, 0.0)


def to_end_mask() -> jax.Array:
    """[64, 64], 1 where token j's decay lies between token i and the end of the chunk."""
    i, j = indices((CHUNK, CHUNK))
    return jnp.where(j > i, 1.0, 0.0)


def level_mask(level: Any) -> jax.Array:
    """[64, 64], 1 where token j's decay lies between token i and the middle of its block."""
    i, j = indices((CHUNK, CHUNK))
    half = jnp.int32(1) << level
    middle = (i & -2 * half) + half
    right, left = (i >= middle) & (j >= middle) & (j <= i), (i < middle) & (j > i) & (j < middle)
    return jnp.where(right | left, 1.0, 0.0)


def corners(level: Any) -> jax.Array:
    """[64, 64], the pairs of a token i in a right half and j in the left half of its block."""
    i, j = indices((CHUNK, CHUNK))
    half = jnp.int32(1) << level
    return (i > j) & ((i ^ j) >= half) & ((i ^ j) < 2 * half)


def summed(mask_s: Any, halves: Any, *, transpose: bool = False) -> jax.Array:
    """mask @ value for a split value, to float32's order of precision."""
    mask_s = mask_s.T if transpose else mask_s
    return products([(mask_s, halves.at[0]), (mask_s, halves.at[1])])[0]


def prepare_channel(
    q: jax.Array, k: jax.Array, w: jax.Array, log_decay: jax.Array, gates: jax.Array, static: Static, *, gradient: bool
) -> Chunks:
    """The chunks under a decay per channel.

    Args:
        q, k: [B, T, Hk, K], T a multiple of 64; w: [B, T, Hw, K].
        log_decay: [B, T, H, K] float32.
        gates: [B, H, N, GATES, 64].
        static: the options.
        gradient: whether to return the inverse.
    """
    batch, length, heads, key_dim = log_decay.shape
    count, dtype, parts = length // CHUNK, q.dtype, key_dim // PART
    invert = static.erase and gradient
    out = [jax.ShapeDtypeStruct(log_decay.shape, dtype)] * 3
    square = jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), dtype)
    out += [square, *[jax.ShapeDtypeStruct(log_decay.shape, dtype)] * static.erase, *[square] * (2 * invert)]

    def body(q_ref: Any, k_ref: Any, w_ref: Any, decay_ref: Any, gates_ref: Any, *refs: Any) -> None:
        decayed_refs, (scores_ref, *solution_refs), refs = refs[:3], refs[3 : len(out)], refs[len(out) :]
        q_s, k_s, w_s, x_s, decay_s, mask_s, p_s, inverse_s, gates_s, again_s, *spare, loaded = refs
        b, h, n = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
        rows = pl.ds(n * CHUNK, CHUNK)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        for c in range(parts):
            part = pl.ds(c * PART, PART)
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, key_head, part], q_s.at[c], loaded)
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, key_head, part], k_s.at[c], loaded)
            plgpu.copy_gmem_to_smem(w_ref.at[b, rows, write_head, part], w_s.at[c], loaded)
        plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates_s, loaded)
        plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], again_s, loaded)

        @pl.loop(0, parts)
        def _(c: Any) -> None:
            decay = read_global(decay_ref.at[b, rows, h, pl.ds(c * PART, PART)])
            split(decay, decay_s.at[c, 0], decay_s.at[c, 1])

        plgpu.barrier_wait(loaded)

        def set_mask(mask: jax.Array) -> None:
            mask_s[...] = mask.astype(jnp.bfloat16)
            plgpu.commit_smem()

        def decayed(c: Any, *keys: tuple[Any, int]) -> None:
            """Writes one part of keys, multiplied by their decay under the mask, to x_s: pairs of (tile, where to)."""
            factor = jnp.exp(summed(mask_s, decay_s.at[c]))
            for source, slot in keys:
                x_s[slot, ...] = (read(source.at[c]) * factor).astype(dtype)
            plgpu.commit_smem()

        set_mask(from_start_mask())

        @pl.loop(0, parts)
        def _(c: Any) -> None:
            decayed(c, (q_s, _Q), (k_s, _K))
            for slot in (_Q, _K):
                plgpu.copy_smem_to_gmem(x_s.at[slot], decayed_refs[slot].at[b, rows, h, pl.ds(c * PART, PART)])
            plgpu.wait_smem_to_gmem(0)

        def own(c: Any, scores: jax.Array) -> jax.Array:
            i, j = indices((CHUNK, CHUNK))
            diagonal = jnp.sum(read(q_s.at[c]) * read(w_s.at[c]), axis=1)
            return scores + jnp.where(i == j, along_columns(diagonal, scores), 0.0)

        def join(level: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            set_mask(level_mask(level))

            def add(c: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                scores, lower = carry
                decayed(c, (q_s, _Q), (k_s, _K), (w_s, _W))
                scores = scores + jnp.where(corners(level), product(x_s.at[_Q], x_s.at[_W].T), 0.0)
                if static.erase:
                    lower = lower + jnp.where(corners(level), product(x_s.at[_K], x_s.at[_W].T), 0.0)
                return scores, lower

            return lax.fori_loop(0, parts, add, carry)

        start = lax.fori_loop(0, parts, own, zeros(CHUNK, CHUNK)), zeros(CHUNK, CHUNK)
        scores, lower = lax.fori_loop(0, LEVELS, join, start)
        # From here on w_s holds the write keys decayed to the end of the chunk.
        set_mask(to_end_mask())

        @pl.loop(0, parts)
        def _(c: Any) -> None:
            decayed(c, (w_s, _W))
            w_s[c, ...] = x_s[_W, ...]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(w_s.at[c], decayed_refs[_W].at[b, rows, h, pl.ds(c * PART, PART)])

        same = pair_decay(gates_s, again_s, static)
        scores = scores * (same * static.scale)
        if static.erase:
            lower = lower * same
            tiles = [*(decay_s.at[c, half] for c in range(parts) for half in (0, 1)), *spare]
            inverse = unit_lower_inverse(lower * row_scale(gates_s.at[BETA], lower), tiles)
            scores = times_inverse(scores, inverse, tiles)
            until_end = inverse * row_scale(gates_s.at[TO_END], inverse) if static.gated else inverse
            split(until_end, inverse_s.at[0], inverse_s.at[1])
            plgpu.commit_smem()

            @pl.loop(0, parts)
            def _(c: Any) -> None:
                (solved,) = products([(inverse_s.at[0].T, w_s.at[c]), (inverse_s.at[1].T, w_s.at[c])])
                plgpu.wait_smem_to_gmem(0)
                x_s[0, ...] = solved.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(x_s.at[0], solution_refs[0].at[b, rows, h, pl.ds(c * PART, PART)])

        if invert:
            split(inverse, inverse_s.at[0], inverse_s.at[1])
        p_s[...] = scores.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(p_s, scores_ref.at[b, h, n])
        for half in range(2 * invert):
            plgpu.copy_smem_to_gmem(inverse_s.at[half], solution_refs[1 + half].at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    spare = max(0, len(SCRATCH) - 2 * parts) if static.erase else 0  # the inverse takes over the decays' tiles
    scratch = [smem(parts, CHUNK, PART, dtype=dtype)] * 3
    scratch += [smem(3, CHUNK, PART, dtype=dtype), smem(parts, 2, CHUNK, PART, dtype=jnp.bfloat16)]
    scratch += [smem(CHUNK, CHUNK, dtype=jnp.bfloat16)]
    scratch += [smem(CHUNK, CHUNK, dtype=dtype), smem(2, CHUNK, CHUNK, dtype=dtype)]
    scratch += [plgpu.SMEM((GATES, CHUNK), jnp.float32)] * 2
    scratch += [*SCRATCH[:spare], plgpu.Barrier(num_arrivals=3 * parts + 2)]
    grid = {"chunk": count, "head": heads, "batch": batch}
    arguments = [q, k, w, log_decay, gates]
    results = launch(body, "delta_rule_prepare_channel", out, grid, scratch, static.interpret, arguments)
    q, k, w, scores, solved = (*results, None)[:5]
    sums = jnp.sum(log_decay.reshape(batch, count, CHUNK, heads, key_dim), axis=2).swapaxes(1, 2)
    carry = jnp.exp(sums) * gates[..., FROM_START, -1:]
    return Chunks(q, k, w, gates, carry, scores, solved, results[5:])
