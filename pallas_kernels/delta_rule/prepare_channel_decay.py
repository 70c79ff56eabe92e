"""Prepare chunks under a decay per channel: scores, the inverse, and q, k and w decayed to the ends of their chunk.

Pairs of tokens are joined by halving. At level l each block of 2^(l+1) tokens has a left and a right half: q and k of
the right half decay from the middle, w of the left half up to it, so that no factor exceeds one, and one product over
all 64 tokens joins the halves of all blocks. Exponents are sums of log decays, computed as a product with zeros and
ones, never differences of sums.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import pair_decay, pair_rows_of, pair_rows_tile
from pallas_kernels.common.inverse import SCRATCH as INVERSE
from pallas_kernels.common.inverse import times_inverse, unit_lower_inverse
from pallas_kernels.common.launch import BlockIndex, Phases, launch
from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
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
from pallas_kernels.common.token_gates import BETA, FROM_START, GATES, TO_END
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions

_Q, _K, _W = range(3)
LEVELS = 6  # of halving, from single tokens to the whole chunk


def from_start_mask() -> jax.Array:
    """Return [64, 64], 1 if token j's decay applies between the start of the chunk and token i."""
    i, j = indices((CHUNK, CHUNK))
    return jnp.where(j <= i, 1.0, 0.0)


def to_end_mask() -> jax.Array:
    """Return [64, 64], 1 if token j's decay applies between token i and the end of the chunk."""
    i, j = indices((CHUNK, CHUNK))
    return jnp.where(j > i, 1.0, 0.0)


def level_mask(level: Any) -> jax.Array:
    """Return [64, 64], 1 if token j's decay applies between token i and the middle of its block."""
    i, j = indices((CHUNK, CHUNK))
    half = jnp.int32(1) << level
    middle = (i & -2 * half) + half
    right, left = (i >= middle) & (j >= middle) & (j <= i), (i < middle) & (j > i) & (j < middle)
    return jnp.where(right | left, 1.0, 0.0)


def corners(level: Any) -> jax.Array:
    """Return [64, 64], True for pairs of a token i in the right half and j in the left half of one block."""
    i, j = indices((CHUNK, CHUNK))
    half = jnp.int32(1) << level
    return (i > j) & ((i ^ j) >= half) & ((i ^ j) < 2 * half)


def masked_sum(mask: Any, value: Any, *, transpose: bool = False) -> jax.Array:
    """Return mask @ value to about float32 precision, for a mask and the two halves of a value in shared memory."""
    mask = mask.T if transpose else mask
    return products([(mask, value.at[0]), (mask, value.at[1])])[0]


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
    """Prepare the chunks under a decay per channel.

    Args:
        q, k: [B, T, Hk, K], T a multiple of 64.
        w: write keys [B, T, Hw, K].
        log_decay: [B, T, H, K] float32.
        gates: [B, H, N, GATES, 64].
        options: fixed options of the kernels.
        gradient: return the inverse too.
    """
    batch, length, heads, key_dim = log_decay.shape
    count, dtype, slabs = length // CHUNK, q.dtype, key_dim // SLAB
    invert = options.erase and gradient
    keys = jax.ShapeDtypeStruct(log_decay.shape, dtype)
    square = jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), dtype)
    out = {
        "decayed": [keys] * 3,  # q, k and w
        "scores": square,
        "solved": keys if options.erase else None,
        "inverse": [square, square] if invert else None,
    }

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        work, store = shared.phases.work, shared.phases.store
        w_s, gates_s = shared.w, shared.gates
        b, h, n = index("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        plgpu.copy_gmem_to_smem(source.gates.at[b, h, n], gates_s, shared.loaded)
        plgpu.copy_gmem_to_smem(pair_rows_of(source.gates.at[b, h, n]), shared.pair_rows, shared.loaded)

        def channels(slab: Any) -> Any:
            return pl.ds(slab * SLAB, SLAB)

        def set_mask(mask: jax.Array) -> None:
            work.mask[...] = mask.astype(jnp.bfloat16)
            plgpu.commit_smem()

        def write_decayed(keys: Sequence[Any], targets: Sequence[Any]) -> None:
            """Write keys, multiplied by their decay under the mask."""
            factor = jnp.exp(masked_sum(work.mask, work.decay))
            for key, decayed in zip(keys, targets, strict=True):
                decayed[...] = (read(key) * factor).astype(dtype)
            plgpu.commit_smem()

        def add_slab(slab: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """Add the products of 64 channels to <q, w> and <k, w>; write q, k, w decayed to the ends of the chunk."""
            scores, lower = carry
            keys = [work.keys.at[_Q], work.keys.at[_K], w_s.at[slab]]
            heads_of = (key_head, key_head, write_head)
            for ref, head, tile in zip((source.q, source.k, source.w), heads_of, keys, strict=True):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, head, channels(slab)], tile, shared.keys_loaded)
            plgpu.copy_gmem_to_smem(source.log_decay.at[b, rows, h, channels(slab)], work.log_decay, shared.keys_loaded)
            plgpu.barrier_wait(shared.keys_loaded)
            split(read(work.log_decay), work.decay.at[0], work.decay.at[1])
            set_mask(from_start_mask())
            decayed = [work.decayed.at[slot] for slot in (_Q, _K)]
            write_decayed(keys[:2], decayed)
            for slot in (_Q, _K):
                plgpu.copy_smem_to_gmem(decayed[slot], target.decayed[slot].at[b, rows, h, channels(slab)])
            i, j = indices((CHUNK, CHUNK))
            diagonal = along_columns(jnp.sum(read(keys[_Q]) * read(keys[_W]), axis=1), scores)
            scores = scores + jnp.where(i == j, diagonal, 0.0)
            plgpu.wait_smem_to_gmem(0)

            def join(level: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                scores, lower = carry
                decayed_s, keys_s, slabs_s = opaque_address(work.decayed, work.keys, w_s)
                decayed = [decayed_s.at[slot] for slot in (_Q, _K, _W)]
                set_mask(level_mask(level))
                write_decayed([keys_s.at[_Q], keys_s.at[_K], slabs_s.at[slab]], decayed)
                scores = scores + jnp.where(corners(level), product(decayed[_Q], decayed[_W].T), 0.0)
                if options.erase:
                    lower = lower + jnp.where(corners(level), product(decayed[_K], decayed[_W].T), 0.0)
                return scores, lower

            scores, lower = lax.fori_loop(0, LEVELS, join, (scores, lower))
            # From here on w_s holds the write keys decayed to the end of the chunk.
            set_mask(to_end_mask())
            write_decayed([w_s.at[slab]], [w_s.at[slab]])
            plgpu.copy_smem_to_gmem(w_s.at[slab], target.decayed[_W].at[b, rows, h, channels(slab)])
            return scores, lower

        scores, lower = lax.fori_loop(0, slabs, add_slab, (zeros(CHUNK, CHUNK), zeros(CHUNK, CHUNK)))
        plgpu.barrier_wait(shared.loaded)
        same_segment = pair_decay(gates_s, shared.pair_rows, decay=options.decay, resets=options.resets)
        scores = scores * (same_segment * options.scale)
        if options.erase:
            lower = lower * same_segment
            inverse = unit_lower_inverse(lower * row_scale(gates_s.at[BETA], lower), shared.phases.inverse)
            scores = times_inverse(scores, shared.phases.inverse)
            until_end = inverse * row_scale(gates_s.at[TO_END], inverse) if options.gated else inverse
            plgpu.commit_smem()  # the inverse's operands are dead: the results reuse their memory
            split(until_end, store.inverse.at[0], store.inverse.at[1])
        store.scores[...] = scores.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(store.scores, target.scores.at[b, h, n])
        if options.erase:

            @pl.loop(0, slabs)
            def _(slab: Any) -> None:
                (solved,) = products([(store.inverse.at[half].T, w_s.at[slab]) for half in (0, 1)])
                plgpu.wait_smem_to_gmem(0)
                store.solved[...] = solved.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(store.solved, target.solved.at[b, rows, h, channels(slab)])

        if invert:
            plgpu.commit_smem()
            split(inverse, store.inverse.at[0], store.inverse.at[1])
            plgpu.commit_smem()
        for half, ref in enumerate(target.inverse or []):
            plgpu.copy_smem_to_gmem(store.inverse.at[half], ref.at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    results = launch(
        body,
        "delta_rule_prepare_channel",
        inputs={"q": q, "k": k, "w": w, "log_decay": log_decay, "gates": gates},
        out=out,
        scratch={
            "w": smem(slabs, CHUNK, SLAB, dtype=dtype),
            # Sharing memory lets a multiprocessor of an H200 hold two blocks, up to K = 128.
            "phases": Phases(
                work={
                    "keys": smem(2, CHUNK, SLAB, dtype=dtype),
                    "decayed": smem(3, CHUNK, SLAB, dtype=dtype),
                    "log_decay": smem(CHUNK, SLAB, dtype=jnp.float32),
                    "decay": smem(2, CHUNK, SLAB, dtype=jnp.bfloat16),  # the halves of log_decay
                    "mask": smem(CHUNK, CHUNK, dtype=jnp.bfloat16),
                },
                inverse=INVERSE,
                store={
                    "scores": smem(CHUNK, CHUNK, dtype=dtype),
                    "inverse": smem(2, CHUNK, CHUNK, dtype=dtype),
                    "solved": smem(CHUNK, SLAB, dtype=dtype),
                },
            ),
            "gates": plgpu.SMEM((GATES, CHUNK), jnp.float32),
            "pair_rows": pair_rows_tile(),
            "loaded": plgpu.Barrier(num_arrivals=2),
            "keys_loaded": plgpu.Barrier(num_arrivals=4),
        },
        grid={"batch": batch, "chunk": count, "head": heads},
        interpret=options.interpret,
    )
    q, k, w = results.decayed
    sums = jnp.sum(log_decay.reshape(batch, count, CHUNK, heads, key_dim), axis=2).swapaxes(1, 2)
    carry = jnp.exp(sums) * gates[..., FROM_START, -1:]
    return Chunks(q, k, w, gates, carry, results.scores, results.solved, results.inverse)
