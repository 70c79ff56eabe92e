"""Gradients of keys, queries and decays inside each chunk under a decay per channel. Parallel over all chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import launch
from pallas_kernels.common.tiles import (
    CHUNK,
    along_columns,
    indices,
    opaque_address,
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
    SLAB,
    corners,
    from_start_mask,
    level_mask,
    summed,
    to_end_mask,
)

_Q, _K, _W, _DECAY = range(4)


class _Operands(NamedTuple):
    """Shared memory that products read."""

    keys: Any  # q, k and w under a decay
    pairs: Any  # gradients of the pairs that a level joins
    decay: Any  # two halves of log_decay
    exponent: Any  # two halves of the gradient of an exponent

    @staticmethod
    def types(dtype: Any) -> list[Any]:
        half = smem(2, CHUNK, SLAB, dtype=jnp.bfloat16)
        return [smem(3, CHUNK, SLAB, dtype=dtype), smem(2, CHUNK, CHUNK, dtype=dtype), half, half]


def gradients_channel_decay(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    log_decay: jax.Array,
    pairs: list[jax.Array],
    decayed: list[jax.Array],
    options: DeltaRuleOptions,
) -> list[jax.Array]:
    """Gradients by value head: dq, dk, dw, and that of log_decay but for the part through what a chunk keeps.

    All are [B, T, H, K]; the first three in the type of q, or float32 where several value heads share a key head.
    Without erase dk is zero. No exponent's gradient is a difference of sums: each level's product of zeros and ones,
    transposed, takes it to the tokens between the pair.

    Args:
        q, k: [B, T, Hk, K]; w: [B, T, Hw, K].
        log_decay: [B, T, H, K] float32.
        pairs: of `gradients` without inside: the gradients of <q, w> and, with erase, <k, w>, [B, H, N, 64, 64].
        decayed: likewise those of the decayed q, k (with erase) and w, [B, T, H, K].
        options: fixed options of the kernels.
    """
    batch, length, heads, key_dim = log_decay.shape
    count, dtype = length // CHUNK, q.dtype
    alone = heads == q.shape[2] == w.shape[2]
    result = jax.ShapeDtypeStruct(log_decay.shape, dtype if alone else jnp.float32)
    out = [result] * 3 + [jax.ShapeDtypeStruct(log_decay.shape, jnp.float32)]
    kinds = (_Q, _K, _W) if options.erase else (_Q, _W)
    arguments = [q, k, w, log_decay, *pairs, *decayed]

    def body(at: Any, *refs: Any) -> None:
        (q_ref, k_ref, w_ref, decay_ref), refs = refs[:4], refs[4:]
        pairs_refs, refs = refs[: len(pairs)], refs[len(pairs) :]
        decayed_refs, (*out_refs, log_decay_ref), refs = (
            refs[: len(kinds)],
            refs[len(kinds) :][:4],
            refs[len(kinds) + 4 :],
        )
        (keys_s, given_s, pairs_s, mask_s, sums_s, loaded), operands = refs[:6], _Operands(*refs[6:])
        b, h, n, c = at("batch", "head", "chunk", "part")
        rows, part = pl.ds(n * CHUNK, CHUNK), pl.ds(c * SLAB, SLAB)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        for slot, ref, head in ((_Q, q_ref, key_head), (_K, k_ref, key_head), (_W, w_ref, write_head)):
            plgpu.copy_gmem_to_smem(ref.at[b, rows, head, part], keys_s.at[slot], loaded)
        for slot, ref in zip(kinds, decayed_refs, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b, rows, h, part], given_s.at[slot], loaded)
        for slot, ref in enumerate(pairs_refs):
            plgpu.copy_gmem_to_smem(ref.at[b, h, n], pairs_s.at[slot], loaded)
        split(read_global(decay_ref.at[b, rows, h, part]), operands.decay.at[0], operands.decay.at[1])
        plgpu.barrier_wait(loaded)

        def decay_under(mask: jax.Array, tiles: _Operands, *slots: int) -> jax.Array:
            """The decay under a mask, and in tiles.keys those that it multiplies, rounded as in the forward pass."""
            mask_s[...] = mask.astype(jnp.bfloat16)
            plgpu.commit_smem()
            factor = jnp.exp(summed(mask_s, tiles.decay))
            for slot in slots:
                tiles.keys[slot, ...] = (read(keys_s.at[slot]) * factor).astype(dtype)
            return factor

        def to_tokens(exponent: jax.Array, tiles: _Operands) -> jax.Array:
            split(exponent, tiles.exponent.at[0], tiles.exponent.at[1])
            plgpu.commit_smem()
            at_tokens = summed(mask_s, tiles.exponent, transpose=True)
            plgpu.commit_smem()  # the mask has served
            return at_tokens

        # Through the memories at the two ends of the chunk.
        sums_s[_DECAY, ...] = zeros(CHUNK, SLAB)
        for mask, slots in ((from_start_mask(), kinds[:-1]), (to_end_mask(), (_W,))):
            factor = decay_under(mask, operands, *slots)
            exponent = zeros(CHUNK, SLAB)
            for slot in slots:
                given = read(given_s.at[slot])
                sums_s[slot, ...] = factor * given
                exponent = exponent + read(operands.keys.at[slot]) * given
            sums_s[_DECAY, ...] = read(sums_s.at[_DECAY]) + to_tokens(exponent, operands)

        # Of each token with itself, which no decay comes between.
        i, j = indices((CHUNK, CHUNK))
        own = along_columns(jnp.sum(jnp.where(i == j, read(pairs_s.at[0]), 0.0), axis=1), zeros(CHUNK, SLAB))
        sums_s[_Q, ...] = read(sums_s.at[_Q]) + own * read(keys_s.at[_W])
        sums_s[_W, ...] = read(sums_s.at[_W]) + own * read(keys_s.at[_Q])

        @pl.loop(0, LEVELS)
        def _(level: Any) -> None:
            tiles = _Operands(*opaque_address(*operands))
            factor = decay_under(level_mask(level), tiles, *kinds)
            for slot in range(len(pairs)):
                tiles.pairs[slot, ...] = jnp.where(corners(level), read(pairs_s.at[slot]), 0.0).astype(dtype)
            plgpu.commit_smem()
            exponent = zeros(CHUNK, SLAB)
            # What queries and read keys receive, then what write keys do from both.
            for slot in kinds:
                if slot == _W:
                    (d_x,) = products([(tiles.pairs.at[kind].T, tiles.keys.at[kind]) for kind in range(len(pairs))])
                else:
                    d_x = product(tiles.pairs.at[slot], tiles.keys.at[_W])
                sums_s[slot, ...] = read(sums_s.at[slot]) + factor * d_x
                exponent = exponent + read(tiles.keys.at[slot]) * d_x
            sums_s[_DECAY, ...] = read(sums_s.at[_DECAY]) + to_tokens(exponent, tiles)

        log_decay_ref[b, rows, h, part] = read(sums_s.at[_DECAY])
        for slot, ref in enumerate(out_refs):
            value = read(sums_s.at[slot]) if slot in kinds else zeros(CHUNK, SLAB)
            if result.dtype == jnp.float32:
                ref[b, rows, h, part] = value
            else:
                operands.keys[slot, ...] = value.astype(dtype)
        if result.dtype != jnp.float32:
            plgpu.commit_smem()
            for slot, ref in enumerate(out_refs):
                plgpu.copy_smem_to_gmem(operands.keys.at[slot], ref.at[b, rows, h, part])
            plgpu.wait_smem_to_gmem(0)

    scratch = [
        smem(3, CHUNK, SLAB, dtype=dtype),
        smem(3, CHUNK, SLAB, dtype=dtype),
        smem(2, CHUNK, CHUNK, dtype=dtype),
        smem(CHUNK, CHUNK, dtype=jnp.bfloat16),
        smem(4, CHUNK, SLAB, dtype=jnp.float32),
        plgpu.Barrier(num_arrivals=3 + len(kinds) + len(pairs)),
        *_Operands.types(dtype),
    ]
    grid = {"batch": batch, "chunk": count, "part": key_dim // SLAB, "head": heads}
    return launch(body, "delta_rule_channel_gradients", out, grid, scratch, options.interpret, arguments)
