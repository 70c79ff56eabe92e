"""Chunks under a decay per channel: scores, the inverse, and keys and queries decayed to the ends of their chunk.

Pairs of tokens are joined by halving: at level l, each block of 2^(l+1) tokens has a left and a right half, its queries
and read keys decay from the middle and its write keys up to it, so that no factor is above one, and one product of all
64 tokens joins the halves of all blocks. Exponents are sums of log decays, by a product with zeros and ones, and never
differences.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import BETA, FROM_START, GATES, TO_END, pair_decay, pair_rows_of, pair_rows_tile
from pallas_kernels.common.inverse import SCRATCH as INVERSE
from pallas_kernels.common.inverse import times_inverse, unit_lower_inverse
from pallas_kernels.common.launch import launch
from pallas_kernels.common.tiles import (
    CHUNK,
    along_columns,
    indices,
    opaque_address,
    product,
    products,
    read,
    row_scale,
    smem,
    split,
    zeros,
)
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions

_Q, _K, _W = range(3)
SLAB = 64  # key channels at a time
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


def prepare_channel_decay(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    log_decay: jax.Array,
    gates: jax.Array,
    options: DeltaRuleOptions,
    *,
    gradient: bool,
) -> Chunks:
    """The chunks under a decay per channel.

    Args:
        q, k: [B, T, Hk, K], T a multiple of 64; w: [B, T, Hw, K].
        log_decay: [B, T, H, K] float32.
        gates: [B, H, N, GATES, 64].
        options: fixed options of the kernels.
        gradient: whether to return the inverse.
    """
    batch, length, heads, key_dim = log_decay.shape
    count, dtype, parts = length // CHUNK, q.dtype, key_dim // SLAB
    invert = options.erase and gradient
    out = [jax.ShapeDtypeStruct(log_decay.shape, dtype)] * 3
    square = jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), dtype)
    out += [square, *[jax.ShapeDtypeStruct(log_decay.shape, dtype)] * options.erase, *[square] * (2 * invert)]

    def body(at: Any, q_ref: Any, k_ref: Any, w_ref: Any, decay_ref: Any, gates_ref: Any, *refs: Any) -> None:
        decayed_refs, (scores_ref, *solution_refs), refs = refs[:3], refs[3 : len(out)], refs[len(out) :]
        w_s, shared, gates_s, pair_rows_s, loaded, keys_loaded = refs
        (keys_s, x_s, log_decay_s, decay_s, mask_s), inverse_s, (p_s, halves_s, solved_s) = shared
        b, h, n = at("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates_s, loaded)
        plgpu.copy_gmem_to_smem(pair_rows_of(gates_ref.at[b, h, n]), pair_rows_s, loaded)

        def channels(c: Any) -> Any:
            return pl.ds(c * SLAB, SLAB)

        def set_mask(mask: jax.Array) -> None:
            mask_s[...] = mask.astype(jnp.bfloat16)
            plgpu.commit_smem()

        def decayed(keys: Sequence[Any], targets: Sequence[Any]) -> None:
            """Writes keys, multiplied by their decay under the mask."""
            factor = jnp.exp(summed(mask_s, decay_s))
            for source, target in zip(keys, targets, strict=True):
                target[...] = (read(source) * factor).astype(dtype)
            plgpu.commit_smem()

        def part(c: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """Adds the products of 64 channels to <q, w> and <k, w>, and writes them decayed to the chunk's ends."""
            scores, lower = carry
            keys = [keys_s.at[_Q], keys_s.at[_K], w_s.at[c]]
            for ref, head, target in zip((q_ref, k_ref, w_ref), (key_head, key_head, write_head), keys, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, head, channels(c)], target, keys_loaded)
            plgpu.copy_gmem_to_smem(decay_ref.at[b, rows, h, channels(c)], log_decay_s, keys_loaded)
            plgpu.barrier_wait(keys_loaded)
            split(read(log_decay_s), decay_s.at[0], decay_s.at[1])
            set_mask(from_start_mask())
            x = [x_s.at[slot] for slot in (_Q, _K)]
            decayed(keys[:2], x)
            for slot in (_Q, _K):
                plgpu.copy_smem_to_gmem(x[slot], decayed_refs[slot].at[b, rows, h, channels(c)])
            i, j = indices((CHUNK, CHUNK))
            own = along_columns(jnp.sum(read(keys[_Q]) * read(keys[_W]), axis=1), scores)
            scores = scores + jnp.where(i == j, own, 0.0)
            plgpu.wait_smem_to_gmem(0)

            def join(level: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                scores, lower = carry
                new_x_s, new_keys_s, new_w_s = opaque_address(x_s, keys_s, w_s)
                x = [new_x_s.at[slot] for slot in (_Q, _K, _W)]
                set_mask(level_mask(level))
                decayed([new_keys_s.at[_Q], new_keys_s.at[_K], new_w_s.at[c]], x)
                scores = scores + jnp.where(corners(level), product(x[_Q], x[_W].T), 0.0)
                if options.erase:
                    lower = lower + jnp.where(corners(level), product(x[_K], x[_W].T), 0.0)
                return scores, lower

            scores, lower = lax.fori_loop(0, LEVELS, join, (scores, lower))
            # From here on w_s holds the write keys decayed to the end of the chunk.
            set_mask(to_end_mask())
            decayed([w_s.at[c]], [w_s.at[c]])
            plgpu.copy_smem_to_gmem(w_s.at[c], decayed_refs[_W].at[b, rows, h, channels(c)])
            return scores, lower

        scores, lower = lax.fori_loop(0, parts, part, (zeros(CHUNK, CHUNK), zeros(CHUNK, CHUNK)))
        plgpu.barrier_wait(loaded)
        same = pair_decay(gates_s, pair_rows_s, decay=options.decay, resets=options.resets)
        scores = scores * (same * options.scale)
        if options.erase:
            lower = lower * same
            inverse = unit_lower_inverse(lower * row_scale(gates_s.at[BETA], lower), inverse_s)
            scores = times_inverse(scores, inverse_s)
            until_end = inverse * row_scale(gates_s.at[TO_END], inverse) if options.gated else inverse
            plgpu.commit_smem()  # the inverse's memory has served
            split(until_end, halves_s.at[0], halves_s.at[1])
        p_s[...] = scores.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(p_s, scores_ref.at[b, h, n])
        if options.erase:

            @pl.loop(0, parts)
            def _(c: Any) -> None:
                (solved,) = products([(halves_s.at[half].T, w_s.at[c]) for half in (0, 1)])
                plgpu.wait_smem_to_gmem(0)
                solved_s[...] = solved.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(solved_s, solution_refs[0].at[b, rows, h, channels(c)])

        if invert:
            plgpu.commit_smem()
            split(inverse, halves_s.at[0], halves_s.at[1])
            plgpu.commit_smem()
        for half in range(2 * invert):
            plgpu.copy_smem_to_gmem(halves_s.at[half], solution_refs[1 + half].at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    tile, square = smem(CHUNK, SLAB, dtype=dtype), smem(CHUNK, CHUNK, dtype=dtype)
    # One after the other: what a part works in, what the inverse does, what is written. So an H200 holds two blocks, up
    # to K = 128.
    working = [smem(count, CHUNK, SLAB, dtype=dtype) for count in (2, 3)] + [smem(CHUNK, SLAB, dtype=jnp.float32)]
    working += [smem(2, CHUNK, SLAB, dtype=jnp.bfloat16), smem(CHUNK, CHUNK, dtype=jnp.bfloat16)]
    shared = plgpu.RefUnion(working, INVERSE, [square, smem(2, CHUNK, CHUNK, dtype=dtype), tile])
    scratch = [smem(parts, CHUNK, SLAB, dtype=dtype), shared, plgpu.SMEM((GATES, CHUNK), jnp.float32), pair_rows_tile()]
    scratch += [plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=4)]
    grid = {"batch": batch, "chunk": count, "head": heads}
    arguments = [q, k, w, log_decay, gates]
    results = launch(body, "delta_rule_prepare_channel", out, grid, scratch, options.interpret, arguments)
    q, k, w, scores, solved = (*results, None)[:5]
    sums = jnp.sum(log_decay.reshape(batch, count, CHUNK, heads, key_dim), axis=2).swapaxes(1, 2)
    carry = jnp.exp(sums) * gates[..., FROM_START, -1:]
    return Chunks(q, k, w, gates, carry, scores, solved, results[5:])
