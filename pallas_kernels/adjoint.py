"""The recurrence of the gradient: from the last chunk to the first, with the gradient of the memory in registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gates import BETA, FROM_START, SCALES, TO_END
from pallas_kernels.prepare import Chunks, Static
from pallas_kernels.recurrence import value_tile
from pallas_kernels.tiles import (
    CHUNK,
    along_columns,
    launch,
    products,
    read,
    read_global,
    read_global_rows,
    row_scale,
    smem,
    split,
)


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
    key_dim, count, dtype = q.shape[3], length // CHUNK, d_out.dtype
    width = min(value_tile(key_dim), value_dim)
    stages = 2 if key_dim <= 128 else 1
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    out = [
        jax.ShapeDtypeStruct(d_out.shape, dtype),
        jax.ShapeDtypeStruct(d_out.shape, dtype),
        jax.ShapeDtypeStruct((batch, heads, count, key_dim, value_dim), dtype),
        jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
    ]
    inputs = {"q": q, "k": k, "w": w, "d_out": d_out, "gates": gates, "scores": scores}
    tiles = {
        "q": tile(stages, CHUNK, key_dim),
        "k": tile(stages, CHUNK, key_dim),
        "w": tile(stages, CHUNK, key_dim),
        "d_out": tile(stages, CHUNK, width),
        "gates": plgpu.SMEM((stages, SCALES, CHUNK), jnp.float32),
        "scores": tile(stages, CHUNK, CHUNK),
    }
    if solved is not None:
        inputs["w"] = solved
    else:
        del inputs["k"], tiles["k"]

    carries = 0 if carry is None else 1

    def body(*refs: Any) -> None:
        source = dict(zip(inputs, refs, strict=False))
        carry_refs, refs = refs[len(inputs) :][:carries], refs[len(inputs) + carries :]
        d_final_ref, z_ref, d_v_ref, d_states_ref, d_initial_ref = refs[:5]
        *tile_refs, state_s, r_s, x_s, d_v_s, loaded = refs[5:]
        buffer = dict(zip(tiles, tile_refs, strict=True))
        b, h, column = (lax.axis_index(name) for name in ("batch", "head", "values"))
        columns = pl.ds(column * width, width)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // inputs["w"].shape[2])

        def load(n: Any, slot: Any) -> None:
            rows = pl.ds(n * CHUNK, CHUNK)
            where = {
                "q": (b, rows, key_head),
                "k": (b, rows, key_head),
                "w": (b, rows, write_head),
                "d_out": (b, rows, h, columns),
            }
            for name, ref in source.items():
                part = ref.at[where.get(name, (b, h, n))]
                if name == "gates":
                    part = part.at[pl.ds(0, SCALES)]
                plgpu.copy_gmem_to_smem(part, buffer[name].at[slot], loaded.at[slot])

        def chunk(step: Any, d_memory: jax.Array) -> jax.Array:
            n = count - 1 - step
            slot = lax.rem(step, jnp.int32(stages))
            if stages == 1:
                load(n, slot)
            else:
                pl.when(n > 0)(lambda: load(n - 1, 1 - slot))
            split(d_memory, state_s.at[0], state_s.at[1])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_s.at[0], d_states_ref.at[b, h, n, :, columns])
            plgpu.barrier_wait(loaded.at[slot])
            now = {name: ref.at[slot] for name, ref in buffer.items()}
            gates_s = now["gates"]
            kept = None
            if carry is not None:
                kept = along_columns(read_global_rows(carry_refs[0].at[b, h, n]), d_memory)
            elif static.gated:
                kept = gates_s[FROM_START, CHUNK - 1]
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
            rows = pl.ds(n * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(r_s, z_ref.at[b, rows, h, columns])
            plgpu.copy_smem_to_gmem(d_v_s, d_v_ref.at[b, rows, h, columns])
            pairs = [(now["q"].T, x_s.at[0])]
            if static.erase:
                pairs += [(now["k"].T, x_s.at[1])]
            (added,) = products(pairs)
            if kept is not None:
                d_memory = d_memory * kept
            plgpu.wait_smem_to_gmem(0)
            return d_memory + added

        if stages > 1:
            load(count - 1, 0)
        d_memory = read_global(d_final_ref.at[b, h, :, columns])
        d_initial_ref[b, h, :, columns] = lax.fori_loop(0, count, chunk, d_memory)

    scratch = [
        *tiles.values(),
        tile(2, key_dim, width),
        tile(CHUNK, width),
        tile(2, CHUNK, width),
        tile(CHUNK, width),
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
    ]
    grid = {"values": value_dim // width, "head": heads, "batch": batch}
    arguments = [*inputs.values(), *([] if carry is None else [carry]), d_final]
    return launch(body, "delta_rule_recur_back", out, grid, scratch, static.interpret, arguments)
