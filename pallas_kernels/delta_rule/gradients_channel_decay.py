"""Gradients of q, k, w and decays inside each chunk under a decay per channel. Parallel over chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import BlockIndex, launch
from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
    along_columns,
    indices,
    opaque_addresses,
    product,
    products,
    read,
    read_global,
    smem,
    split,
    zeros,
)
from pallas_kernels.delta_rule.prepare import DeltaRuleOptions
from pallas_kernels.delta_rule.prepare_channel_decay import (
    LEVELS,
    corners,
    from_start_mask,
    level_mask,
    masked_sum,
    to_end_mask,
)

_Q, _K, _W, _DECAY = range(4)


def gradients_channel_decay(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    log_decay: jax.Array,
    d_pairs: list[jax.Array],
    d_decayed: list[jax.Array],
    options: DeltaRuleOptions,
) -> list[jax.Array]:
    """Return dq, dk, dw and d_log_decay by value head, the last without the decay of the state over a chunk.

    All are [B, T, H, K]; the first three in the type of q, or float32 if several value heads share a key head. Without
    erase dk is zero. No exponent's gradient is a difference of sums: it goes to the tokens between a pair through the
    zeros and ones of each level, transposed.

    Args:
        q, k: [B, T, Hk, K].
        w: write keys [B, T, Hw, K].
        log_decay: [B, T, H, K] float32.
        d_pairs: of `gradients`: the gradients of <q, w> and, with erase, of <k, w>, [B, H, N, 64, 64].
        d_decayed: of `gradients`: the gradients of the decayed q, k (with erase) and w, [B, T, H, K].
        options: fixed options of the kernels.
    """
    batch, length, heads, key_dim = log_decay.shape
    count, dtype = length // CHUNK, q.dtype
    ungrouped = heads == q.shape[2] == w.shape[2]
    result = jax.ShapeDtypeStruct(log_decay.shape, dtype if ungrouped else jnp.float32)
    slots = (_Q, _K, _W) if options.erase else (_Q, _W)

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        operands, sums_s, loaded = shared.operands, shared.sums, shared.loaded
        b, h, n, slab = index("batch", "head", "chunk", "slab")
        rows, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(slab * SLAB, SLAB)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        for slot, ref, head in ((_Q, source.q, key_head), (_K, source.k, key_head), (_W, source.w, write_head)):
            plgpu.copy_gmem_to_smem(ref.at[b, rows, head, channels], shared.keys.at[slot], loaded)
        for slot, ref in zip(slots, source.d_decayed, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b, rows, h, channels], shared.d_decayed.at[slot], loaded)
        for slot, ref in enumerate(source.d_pairs):
            plgpu.copy_gmem_to_smem(ref.at[b, h, n], shared.d_pairs.at[slot], loaded)
        split(read_global(source.log_decay.at[b, rows, h, channels]), operands.decay.at[0], operands.decay.at[1])
        plgpu.barrier_wait(loaded)

        def apply_decay(mask: jax.Array, operands: Any, *slots: int) -> jax.Array:
            """Return the decay under a mask; write the keys times it, rounded as in the forward pass."""
            shared.mask[...] = mask.astype(jnp.bfloat16)
            plgpu.commit_smem()
            factor = jnp.exp(masked_sum(shared.mask, operands.decay))
            for slot in slots:
                operands.keys[slot, ...] = (read(shared.keys.at[slot]) * factor).astype(dtype)
            return factor

        def to_tokens(exponent: jax.Array, operands: Any) -> jax.Array:
            """Return the gradient of the log decays from that of the exponent they sum to under the mask."""
            split(exponent, operands.exponent.at[0], operands.exponent.at[1])
            plgpu.commit_smem()
            at_tokens = masked_sum(shared.mask, operands.exponent, transpose=True)
            plgpu.commit_smem()  # the mask is dead: the next level overwrites it
            return at_tokens

        # Through the states at the two ends of the chunk.
        sums_s[_DECAY, ...] = zeros(CHUNK, SLAB)
        for mask, decayed in ((from_start_mask(), slots[:-1]), (to_end_mask(), (_W,))):
            factor = apply_decay(mask, operands, *decayed)
            exponent = zeros(CHUNK, SLAB)
            for slot in decayed:
                d_key = read(shared.d_decayed.at[slot])
                sums_s[slot, ...] = factor * d_key
                exponent = exponent + read(operands.keys.at[slot]) * d_key
            sums_s[_DECAY, ...] = read(sums_s.at[_DECAY]) + to_tokens(exponent, operands)

        # Each token with itself: no decay lies between.
        i, j = indices((CHUNK, CHUNK))
        diagonal = jnp.sum(jnp.where(i == j, read(shared.d_pairs.at[0]), 0.0), axis=1)
        diagonal = along_columns(diagonal, zeros(CHUNK, SLAB))
        sums_s[_Q, ...] = read(sums_s.at[_Q]) + diagonal * read(shared.keys.at[_W])
        sums_s[_W, ...] = read(sums_s.at[_W]) + diagonal * read(shared.keys.at[_Q])

        @pl.loop(0, LEVELS)
        def _(level: Any) -> None:
            tiles = opaque_addresses(operands)
            factor = apply_decay(level_mask(level), tiles, *slots)
            for slot in range(len(d_pairs)):
                joined = jnp.where(corners(level), read(shared.d_pairs.at[slot]), 0.0)
                tiles.d_pairs[slot, ...] = joined.astype(dtype)
            plgpu.commit_smem()
            exponent = zeros(CHUNK, SLAB)
            # q and k receive from w, then w from both.
            for slot in slots:
                if slot == _W:
                    pairs = range(len(d_pairs))
                    (d_x,) = products([(tiles.d_pairs.at[pair].T, tiles.keys.at[pair]) for pair in pairs])
                else:
                    d_x = product(tiles.d_pairs.at[slot], tiles.keys.at[_W])
                sums_s[slot, ...] = read(sums_s.at[slot]) + factor * d_x
                exponent = exponent + read(tiles.keys.at[slot]) * d_x
            sums_s[_DECAY, ...] = read(sums_s.at[_DECAY]) + to_tokens(exponent, tiles)

        target.d_log_decay[b, rows, h, channels] = read(sums_s.at[_DECAY])
        for slot, ref in enumerate(target.d_keys):
            value = read(sums_s.at[slot]) if slot in slots else zeros(CHUNK, SLAB)
            if result.dtype == jnp.float32:
                ref[b, rows, h, channels] = value
            else:
                operands.keys[slot, ...] = value.astype(dtype)
        if result.dtype != jnp.float32:
            plgpu.commit_smem()
            for slot, ref in enumerate(target.d_keys):
                plgpu.copy_smem_to_gmem(operands.keys.at[slot], ref.at[b, rows, h, channels])
            plgpu.wait_smem_to_gmem(0)

    halves = smem(2, CHUNK, SLAB, dtype=jnp.bfloat16)
    results = launch(
        body,
        "delta_rule_channel_gradients",
        inputs={"q": q, "k": k, "w": w, "log_decay": log_decay, "d_pairs": d_pairs, "d_decayed": d_decayed},
        out={"d_keys": [result] * 3, "d_log_decay": jax.ShapeDtypeStruct(log_decay.shape, jnp.float32)},
        scratch={
            "keys": smem(3, CHUNK, SLAB, dtype=dtype),  # q, k and w
            "d_decayed": smem(3, CHUNK, SLAB, dtype=dtype),
            "d_pairs": smem(2, CHUNK, CHUNK, dtype=dtype),
            "mask": smem(CHUNK, CHUNK, dtype=jnp.bfloat16),
            "sums": smem(4, CHUNK, SLAB, dtype=jnp.float32),  # dq, dk, dw and d_log_decay
            "loaded": plgpu.Barrier(num_arrivals=3 + len(slots) + len(d_pairs)),
            "operands": {  # of products
                "keys": smem(3, CHUNK, SLAB, dtype=dtype),  # q, k and w under a decay
                "d_pairs": smem(2, CHUNK, CHUNK, dtype=dtype),  # of the pairs that a level joins
                "decay": halves,
                "exponent": halves,  # its gradient
            },
        },
        grid={"batch": batch, "chunk": count, "slab": key_dim // SLAB, "head": heads},
        interpret=options.interpret,
    )
    return [*results.d_keys, results.d_log_decay]
