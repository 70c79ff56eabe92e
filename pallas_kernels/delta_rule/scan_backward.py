"""The recurrence of the gradient: from the last chunk to the first, with the gradient of the memory in registers."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import BETA, FROM_START, TO_END
from pallas_kernels.common.tiles import CHUNK, products, read, row_scale, smem, split
from pallas_kernels.delta_rule.chunk_loop import Chunk, chunk_loop, tile_width
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions


class Back(NamedTuple):
    """What has to be known from later chunks, of the loss's gradient."""

    d_v: jax.Array  # [B, T, H, V]
    z: list[jax.Array]  # Z = (I + A)^-T dR, the gradient of beta (V - K S) [B, T, H, V], and with rests its rest
    d_states: list[jax.Array]  # of the memory after each chunk [B, H, N, K, V], and with rests its rest
    d_initial: jax.Array  # of the initial memory [B, H, K, V] float32


def scan_backward(
    chunks: Chunks, d_out: jax.Array, d_final: jax.Array, options: DeltaRuleOptions, *, rests: bool = False
) -> Back:
    """The recurrence of the gradient.

    Args:
        chunks: as for `scan`, made for a gradient.
        d_out: gradient of the outputs [B, T, H, V].
        d_final: gradient of the final memory [B, H, K, V] float32.
        options: fixed options of the kernels.
        rests: whether to return also what rounding takes off z and d_states.
    """
    q, k, w, gates, carry, scores, solved, _ = chunks
    batch, length, heads, value_dim = d_out.shape
    key_dim, dtype, halves = q.shape[3], d_out.dtype, 1 + rests
    d_states = jax.ShapeDtypeStruct((batch, heads, length // CHUNK, key_dim, value_dim), dtype)
    out = [jax.ShapeDtypeStruct(d_out.shape, dtype)] * (1 + halves) + [d_states] * halves
    out += [jax.ShapeDtypeStruct(d_final.shape, jnp.float32)]
    inputs = {"q": q, "k": k, "w": w if solved is None else solved, "d_out": d_out, "gates": gates, "scores": scores}
    if solved is None:
        del inputs["k"]

    def step(chunk: Chunk, d_memory: jax.Array, out_refs: Sequence[Any], scratch: Sequence[Any]) -> jax.Array:
        d_v_ref, *z_refs = out_refs[: 1 + halves]
        state_s, z_s, x_s, d_v_s = scratch
        plgpu.wait_smem_to_gmem(halves + 1, wait_read_only=True)  # the chunk after's memory, but not z and d_v
        split(d_memory, state_s.at[0], state_s.at[1])
        plgpu.commit_smem()
        for half, ref in enumerate(out_refs[1 + halves : -1]):
            plgpu.copy_smem_to_gmem(state_s.at[half], ref.at[chunk.states])
        now, kept = chunk.arrive()
        gates_s = now["gates"]
        from_later, from_inside = products(
            [(now["w"], state_s.at[0]), (now["w"], state_s.at[1])], [(now["scores"].T, now["d_out"])]
        )
        if options.gated and not options.erase:  # else the scale is in the write keys
            from_later = from_later * row_scale(gates_s.at[TO_END], from_later)
        z = from_later + from_inside
        plgpu.wait_smem_to_gmem(halves, wait_read_only=True)  # all else of the chunk after
        if rests:
            split(z, z_s.at[0], z_s.at[1])
        else:
            z_s[0, ...] = z.astype(dtype)
        d_v = z * row_scale(gates_s.at[BETA], z)
        d_v_s[...] = d_v.astype(dtype)
        read_gradient = read(now["d_out"]) * options.scale
        if options.gated:
            read_gradient = read_gradient * row_scale(gates_s.at[FROM_START], read_gradient)
            d_v = d_v * row_scale(gates_s.at[FROM_START], d_v)
        x_s[0, ...] = read_gradient.astype(dtype)
        if options.erase:
            x_s[1, ...] = (-d_v).astype(dtype)
        plgpu.commit_smem()
        for half, ref in enumerate(z_refs):
            plgpu.copy_smem_to_gmem(z_s.at[half], ref.at[chunk.rows])
        plgpu.copy_smem_to_gmem(d_v_s, d_v_ref.at[chunk.rows])
        pairs = [(now["q"].T, x_s.at[0])]
        if options.erase:
            pairs += [(now["k"].T, x_s.at[1])]
        (added,) = products(pairs)
        plgpu.commit_smem()  # the tiles have served: those of the next chunk but one may take their place
        if kept is not None:
            d_memory = d_memory * kept
        return d_memory + added

    width = tile_width(key_dim)
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    scratch = [tile(2, key_dim, width), tile(halves, CHUNK, width), tile(2, CHUNK, width), tile(CHUNK, width)]
    results = chunk_loop("delta_rule_recur_back", inputs, carry, d_final, out, scratch, step, options, reverse=True)
    return Back(results[0], results[1 : 1 + halves], results[1 + halves : -1], results[-1])
