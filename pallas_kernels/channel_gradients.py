"""Gradients of keys, queries and decays inside each chunk under a decay per channel. Parallel over all chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.channel import LEVELS, PART, corners, from_start_mask, level_mask, summed, to_end_mask
from pallas_kernels.prepare import Static
from pallas_kernels.tiles import (
    CHUNK,
    along_columns,
    indices,
    launch,
    product,
    products,
    read,
    read_global,
    smem,
    split,
    zeros,
)

_Q, _K, _W, _DECAY = range(4)


def channel_gradients(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    log_decay: jax.Array,
    pairs: list[jax.Array],
    decayed: list[jax.Array],
    static: Static,
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
        static: the options.
    """
    batch, length, heads, key_dim = log_decay.shape
    count, dtype = length // CHUNK, q.dtype
    alone = heads == q.shape[2] == w.shape[2]
    result = jax.ShapeDtypeStruct(log_decay.shape, dtype if alone else jnp.float32)
    out = [result] * 3 + [jax.ShapeDtypeStruct(log_decay.shape, jnp.float32)]
    kinds = (_Q, _K, _W) if static.erase else (_Q, _W)
    arguments = [q, k, w, log_decay, *pairs, *decayed]

    def body(*refs: Any) -> None:
        (q_ref, k_ref, w_ref, decay_ref), refs = refs[:4], refs[4:]
        pairs_refs, refs = refs[: len(pairs)], refs[len(pairs) :]
        decayed_refs, (*out_refs, log_decay_ref), refs = (
            refs[: len(kinds)],
            refs[len(kinds) :][:4],
            refs[len(kinds) + 4 :],
        )
        keys_s, given_s, pairs_s, joined_s, x_s, decay_s, e_s, mask_s, sums_s, loaded = refs
        b, h, n, c = (lax.axis_index(name) for name in ("batch", "head", "chunk", "part"))
        rows, part = pl.ds(n * CHUNK, CHUNK), pl.ds(c * PART, PART)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        for slot, ref, head in ((_Q, q_ref, key_head), (_K, k_ref, key_head), (_W, w_ref, write_head)):
            plgpu.copy_gmem_to_smem(ref.at[b, rows, head, part], keys_s.at[slot], loaded)
        for slot, ref in zip(kinds, decayed_refs, strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b, rows, h, part], given_s.at[slot], loaded)
        for slot, ref in enumerate(pairs_refs):
            plgpu.copy_gmem_to_smem(ref.at[b, h, n], pairs_s.at[slot], loaded)
        split(read_global(decay_ref.at[b, rows, h, part]), decay_s.at[0], decay_s.at[1])
        plgpu.barrier_wait(loaded)

        def decay_under(mask: jax.Array, *slots: int) -> jax.Array:
            """The decay under a mask, and in x_s the keys that it multiplies, rounded as in the forward pass."""
            mask_s[...] = mask.astype(jnp.bfloat16)
            plgpu.commit_smem()
            factor = jnp.exp(summed(mask_s, decay_s))
            for slot in slots:
                x_s[slot, ...] = (read(keys_s.at[slot]) * factor).astype(dtype)
            return factor

        def to_tokens(exponent: jax.Array) -> jax.Array:
            split(exponent, e_s.at[0], e_s.at[1])
            plgpu.commit_smem()
            return summed(mask_s, e_s, transpose=True)

        # Through the memories at the two ends of the chunk.
        sums_s[_DECAY, ...] = zeros(CHUNK, PART)
        for mask, slots in ((from_start_mask(), kinds[:-1]), (to_end_mask(), (_W,))):
            factor = decay_under(mask, *slots)
            exponent = zeros(CHUNK, PART)
            for slot in slots:
                given = read(given_s.at[slot])
                sums_s[slot, ...] = factor * given
                exponent = exponent + read(x_s.at[slot]) * given
            sums_s[_DECAY, ...] = read(sums_s.at[_DECAY]) + to_tokens(exponent)

        # Of each token with itself, which no decay comes between.
        i, j = indices((CHUNK, CHUNK))
        own = along_columns(jnp.sum(jnp.where(i == j, read(pairs_s.at[0]), 0.0), axis=1), zeros(CHUNK, PART))
        sums_s[_Q, ...] = read(sums_s.at[_Q]) + own * read(keys_s.at[_W])
        sums_s[_W, ...] = read(sums_s.at[_W]) + own * read(keys_s.at[_Q])

        @pl.loop(0, LEVELS)
        def _(level: Any) -> None:
            factor = decay_under(level_mask(level), *kinds)
            for slot in range(len(pairs)):
                joined_s[slot, ...] = jnp.where(corners(level), read(pairs_s.at[slot]), 0.0).astype(dtype)
            plgpu.commit_smem()
            exponent = zeros(CHUNK, PART)
            # What queries and read keys receive, then what write keys do from both.
            for slot in kinds:
                if slot == _W:
                    (d_x,) = products([(joined_s.at[kind].T, x_s.at[kind]) for kind in range(len(pairs))])
                else:
                    d_x = product(joined_s.at[slot], x_s.at[_W])
                sums_s[slot, ...] = read(sums_s.at[slot]) + factor * d_x
                exponent = exponent + read(x_s.at[slot]) * d_x
            sums_s[_DECAY, ...] = read(sums_s.at[_DECAY]) + to_tokens(exponent)

        log_decay_ref[b, rows, h, part] = read(sums_s.at[_DECAY])
        for slot, ref in enumerate(out_refs):
            value = read(sums_s.at[slot]) if slot in kinds else zeros(CHUNK, PART)
            if result.dtype == jnp.float32:
                ref[b, rows, h, part] = value
            else:
                x_s[slot, ...] = value.astype(dtype)
        if result.dtype != jnp.float32:
            plgpu.commit_smem()
            for slot, ref in enumerate(out_refs):
                plgpu.copy_smem_to_gmem(x_s.at[slot], ref.at[b, rows, h, part])
            plgpu.wait_smem_to_gmem(0)

    scratch = [
        smem(3, CHUNK, PART, dtype=dtype),
        smem(3, CHUNK, PART, dtype=dtype),
        smem(2, CHUNK, CHUNK, dtype=dtype),
        smem(2, CHUNK, CHUNK, dtype=dtype),
        smem(3, CHUNK, PART, dtype=dtype),
        smem(2, CHUNK, PART, dtype=jnp.bfloat16),
        smem(2, CHUNK, PART, dtype=jnp.bfloat16),
        smem(CHUNK, CHUNK, dtype=jnp.bfloat16),
        smem(4, CHUNK, PART, dtype=jnp.float32),
        plgpu.Barrier(num_arrivals=3 + len(kinds) + len(pairs)),
    ]
    grid = {"part": key_dim // PART, "chunk": count, "head": heads, "batch": batch}
    return launch(body, "delta_rule_channel_gradients", out, grid, scratch, static.interpret, arguments)
