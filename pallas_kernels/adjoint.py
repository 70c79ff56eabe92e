"""The recurrence of the gradient: from the last chunk to the first, with the gradient of the memory in registers."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gates import BETA, FROM_START, TO_END
from pallas_kernels.prepare import Chunks, Static
from pallas_kernels.tiles import CHUNK, products, read, row_scale, smem, split
from pallas_kernels.walk import Chunk, tile_width, walk


def recur_back(chunks: Chunks, d_out: jax.Array, d_final: jax.Array, static: Static) -> list[jax.Array]:
    """What has to be known from later chunks, of the loss's gradient.

    Returns:
        Z = (I + A)^-T dR, the gradient of beta (V - K S) [B, T, H, V]; that of v, beta Z [B, T, H, V];
        that of the memory after each chunk [B, H, N, K, V]; that of the initial memory [B, H, K, V] float32.

    Args:
        chunks: as for `recur`, made for a gradient.
        d_out: gradient of the outputs [B, T, H, V].
        d_final: gradient of the final memory [B, H, K, V] float32.
        static: the options.
    """
    q, k, w, gates, carry, scores, solved, _ = chunks
    batch, length, heads, value_dim = d_out.shape
    key_dim, dtype = q.shape[3], d_out.dtype
    out = [
        jax.ShapeDtypeStruct(d_out.shape, dtype),
        jax.ShapeDtypeStruct(d_out.shape, dtype),
        jax.ShapeDtypeStruct((batch, heads, length // CHUNK, key_dim, value_dim), dtype),
        jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
    ]
    inputs = {"q": q, "k": k, "w": w if solved is None else solved, "d_out": d_out, "gates": gates, "scores": scores}
    if solved is None:
        del inputs["k"]

    def step(chunk: Chunk, d_memory: jax.Array, out_refs: Sequence[Any], scratch: Sequence[Any]) -> jax.Array:
        z_ref, d_v_ref, d_states_ref, _ = out_refs
        state_s, r_s, x_s, d_v_s = scratch
        split(d_memory, state_s.at[0], state_s.at[1])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s.at[0], d_states_ref.at[chunk.states])
        now, kept = chunk.arrive()
        gates_s = now["gates"]
        from_later, from_inside = products(
            [(now["w"], state_s.at[0]), (now["w"], state_s.at[1])], [(now["scores"].T, now["d_out"])]
        )
        if static.gated and not static.erase:  # else the scale is in the write keys
            from_later = from_later * row_scale(gates_s.at[TO_END], from_later)
        z = from_later + from_inside
        r_s[...] = z.astype(dtype)
        d_v = z * row_scale(gates_s.at[BETA], z)
        d_v_s[...] = d_v.astype(dtype)
        read_gradient = read(now["d_out"]) * static.scale
        if static.gated:
            read_gradient = read_gradient * row_scale(gates_s.at[FROM_START], read_gradient)
            d_v = d_v * row_scale(gates_s.at[FROM_START], d_v)
        x_s[0, ...] = read_gradient.astype(dtype)
        if static.erase:
            x_s[1, ...] = (-d_v).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r_s, z_ref.at[chunk.rows])
        plgpu.copy_smem_to_gmem(d_v_s, d_v_ref.at[chunk.rows])
        pairs = [(now["q"].T, x_s.at[0])]
        if static.erase:
            pairs += [(now["k"].T, x_s.at[1])]
        (added,) = products(pairs)
        if kept is not None:
            d_memory = d_memory * kept
        plgpu.wait_smem_to_gmem(0)
        return d_memory + added

    width = tile_width(key_dim)
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    scratch = [tile(2, key_dim, width), tile(CHUNK, width), tile(2, CHUNK, width), tile(CHUNK, width)]
    return walk("delta_rule_recur_back", inputs, carry, d_final, out, scratch, step, static, reverse=True)
