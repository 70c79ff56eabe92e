"""The delta rule from chunk to chunk: one block per batch, head and tile of values keeps its memory in registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gates import BETA, FROM_START, GATES, TO_END
from pallas_kernels.prepare import Chunks, Static
from pallas_kernels.tiles import CHUNK, launch, product, products, read, read_global, row_scale, smem


def value_tile(key_dim: int) -> int:
    """Columns of the memory that one block keeps in its registers."""
    return 64 if key_dim <= 128 else 32


def recur(chunks: Chunks, v: jax.Array, initial: jax.Array, static: Static, *, save: bool) -> list[jax.Array]:
    """Outputs [B, T, H, V] and the final memory [B, H, K, V] float32.

    With save, for the gradient, also R = (I + A)^-1 beta (V - K S) [B, T, H, V], which is what each token writes under
    its key, and the memory before each chunk [B, H, N, K, V], both in the type of v.

    Args:
        chunks: of `prepare` or `prepare_channel`.
        v: [B, T, H, V].
        initial: [B, H, K, V] float32.
        static: the options.
        save: whether a gradient follows.
    """
    q, k, w, gates, carry, inverse, scores = chunks
    batch, length, heads, value_dim = v.shape
    key_dim, count, dtype = q.shape[3], length // CHUNK, v.dtype
    width = min(value_tile(key_dim), value_dim)
    stages = 2 if key_dim <= 128 else 1
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    out = [
        jax.ShapeDtypeStruct(v.shape, dtype),
        jax.ShapeDtypeStruct(initial.shape, jnp.float32),
    ]
    if save:
        out += [
            jax.ShapeDtypeStruct(v.shape, dtype),
            jax.ShapeDtypeStruct((batch, heads, count, key_dim, value_dim), dtype),
        ]
    inputs = {"q": q, "k": k, "w": w, "v": v, "gates": gates, "scores": scores}
    tiles = {
        "q": tile(stages, CHUNK, key_dim),
        "k": tile(stages, CHUNK, key_dim),
        "w": tile(stages, CHUNK, key_dim),
        "v": tile(stages, CHUNK, width),
        "gates": plgpu.SMEM((stages, GATES, CHUNK), jnp.float32),
        "scores": tile(stages, CHUNK, CHUNK),
    }
    if static.erase:
        inputs["inverse"], tiles["inverse"] = inverse[0], tiles["scores"]
    else:
        del inputs["k"], tiles["k"]
    if carry is not None:
        inputs["carry"], tiles["carry"] = carry, plgpu.SMEM((stages, key_dim), jnp.float32)

    def body(*refs: Any) -> None:
        source = dict(zip(inputs, refs, strict=False))
        initial_ref, o_ref, final_ref, *saved_refs = refs[len(inputs) : len(inputs) + 1 + len(out)]
        *tile_refs, state_s, r_s, o_s, loaded = refs[len(inputs) + 1 + len(out) :]
        buffer = dict(zip(tiles, tile_refs, strict=True))
        b, h, column = (lax.axis_index(name) for name in ("batch", "head", "values"))
        columns = pl.ds(column * width, width)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])

        def load(n: Any, slot: Any) -> None:
            rows = pl.ds(n * CHUNK, CHUNK)
            where = {
                "q": (b, rows, key_head),
                "k": (b, rows, key_head),
                "w": (b, rows, write_head),
                "v": (b, rows, h, columns),
            }
            for name, ref in source.items():
                part = ref.at[where.get(name, (b, h, n))]
                plgpu.copy_gmem_to_smem(part, buffer[name].at[slot], loaded.at[slot])

        def chunk(n: Any, memory: jax.Array) -> jax.Array:
            slot = lax.rem(n, jnp.int32(stages))
            if stages == 1:
                load(n, slot)
            else:
                pl.when(n + 1 < count)(lambda: load(n + 1, 1 - slot))
            state_s[...] = memory.astype(dtype)
            plgpu.commit_smem()
            if save:
                plgpu.copy_smem_to_gmem(state_s, saved_refs[1].at[b, h, n, :, columns])
            plgpu.barrier_wait(loaded.at[slot])
            now = {name: ref.at[slot] for name, ref in buffer.items()}
            gates_s = now["gates"]
            kept = None
            if carry is not None:
                kept = row_scale(now["carry"], memory)
            elif static.gated:
                kept = gates_s[FROM_START, CHUNK - 1]
            residual = read(now["v"])
            if static.erase:
                out, recalled = products([(now["q"], state_s)], [(now["k"], state_s)])
                if static.gated:
                    recalled = recalled * row_scale(gates_s.at[FROM_START], recalled)
                residual = residual - recalled
            else:
                out = product(now["q"], state_s)
            write = residual * row_scale(gates_s.at[BETA], residual)
            r_s[...] = write.astype(dtype)
            plgpu.commit_smem()
            if static.erase:
                write = product(now["inverse"], r_s)
                r_s[...] = write.astype(dtype)
                plgpu.commit_smem()
            out = out * static.scale
            if static.gated:
                out = out * row_scale(gates_s.at[FROM_START], out)
            out = out + product(now["scores"], r_s)
            o_s[...] = out.astype(dtype)
            plgpu.commit_smem()
            rows = pl.ds(n * CHUNK, CHUNK)
            plgpu.copy_smem_to_gmem(o_s, o_ref.at[b, rows, h, columns])
            if save:
                plgpu.copy_smem_to_gmem(r_s, saved_refs[0].at[b, rows, h, columns])
            if static.gated:
                plgpu.wait_smem_to_gmem(0)
                r_s[...] = (write * row_scale(gates_s.at[TO_END], write)).astype(dtype)
                plgpu.commit_smem()
            added = product(now["w"].T, r_s)
            if kept is not None:
                memory = memory * kept
            plgpu.wait_smem_to_gmem(0)
            return memory + added

        if stages > 1:
            load(0, 0)
        memory = read_global(initial_ref.at[b, h, :, columns])
        final_ref[b, h, :, columns] = lax.fori_loop(0, count, chunk, memory)

    scratch = [
        *tiles.values(),
        tile(key_dim, width),
        tile(CHUNK, width),
        tile(CHUNK, width),
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
    ]
    grid = {"values": value_dim // width, "head": heads, "batch": batch}
    arguments = [*inputs.values(), initial]
    return launch(body, "delta_rule_recur", out, grid, scratch, static.interpret, arguments)
