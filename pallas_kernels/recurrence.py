"""The delta rule from chunk to chunk: one block per batch, head and tile of values keeps its memory in registers."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gates import BETA, FROM_START, SCALES, TO_END
from pallas_kernels.prepare import Chunks, Static
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


def value_tile(key_dim: int) -> int:
    """Columns of the memory that one block keeps in its registers."""
    return 64 if key_dim <= 128 else 32


def recur(
    chunks: Chunks, v: jax.Array, initial: jax.Array, static: Static, *, keep: Literal["outputs", "states", "final"]
) -> list[jax.Array]:
    """The recurrence, and what is to be kept of it.

    Returns:
        "outputs": outputs [B, T, H, V] and the final memory [B, H, K, V] float32; "final": the latter alone; "states",
        for the gradient: the memory before each chunk [B, H, N, K, V] and R = (I + A)^-1 beta (V - K S) [B, T, H, V],
        which is what each token writes under its key, in the type of v and, as a third, what that rounds away.

    Args:
        chunks: of `prepare` or `prepare_channel`.
        v: [B, T, H, V].
        initial: [B, H, K, V] float32.
        static: the options.
        keep: see above.
    """
    q, k, w, gates, carry, scores, solved, inverse = chunks
    batch, length, heads, value_dim = v.shape
    key_dim, count, dtype = q.shape[3], length // CHUNK, v.dtype
    width = min(value_tile(key_dim), value_dim)
    stages = 2 if key_dim <= 128 else 1
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    each = jax.ShapeDtypeStruct(v.shape, dtype)
    states = jax.ShapeDtypeStruct((batch, heads, count, key_dim, value_dim), dtype)
    final = jax.ShapeDtypeStruct(initial.shape, jnp.float32)
    out = {"outputs": [each, final], "states": [each, states, each], "final": [final]}[keep]
    write = w if solved is None else solved
    inputs: dict[str, Any] = {"w": write, "v": v, "gates": gates}
    keys, square = tile(stages, CHUNK, key_dim), tile(stages, CHUNK, CHUNK)
    tiles = {
        "w": keys,
        "v": tile(stages, CHUNK, width),
        "gates": plgpu.SMEM((stages, SCALES, CHUNK), jnp.float32),
    }
    if keep == "outputs":
        inputs |= {"q": q, "scores": scores}
        tiles |= {"q": keys, "scores": square}
    if static.erase:
        inputs["k"], tiles["k"] = k, keys
    if keep == "states":
        for name, half in zip(("inverse", "rest"), inverse, strict=False):
            inputs[name], tiles[name] = half, square

    carries = 0 if carry is None else 1

    def body(*refs: Any) -> None:
        source = dict(zip(inputs, refs, strict=False))
        carry_refs, refs = refs[len(inputs) :][:carries], refs[len(inputs) + carries :]
        (initial_ref, *out_refs), refs = refs[: 1 + len(out)], refs[1 + len(out) :]
        *tile_refs, state_s, residual_s, write_s, out_s, rest_s, loaded = refs
        buffer = dict(zip(tiles, tile_refs, strict=True))
        b, h, column = (lax.axis_index(name) for name in ("batch", "head", "values"))
        columns = pl.ds(column * width, width)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // write.shape[2])

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
                if name == "gates":
                    part = part.at[pl.ds(0, SCALES)]
                plgpu.copy_gmem_to_smem(part, buffer[name].at[slot], loaded.at[slot])

        def chunk(n: Any, memory: jax.Array) -> jax.Array:
            slot = lax.rem(n, jnp.int32(stages))
            if stages == 1:
                load(n, slot)
            else:
                pl.when(n + 1 < count)(lambda: load(n + 1, 1 - slot))
            state_s[...] = memory.astype(dtype)
            plgpu.commit_smem()
            if keep == "states":
                plgpu.copy_smem_to_gmem(state_s, out_refs[1].at[b, h, n, :, columns])
            plgpu.barrier_wait(loaded.at[slot])
            now = {name: ref.at[slot] for name, ref in buffer.items()}
            gates_s = now["gates"]
            kept = None
            if carry is not None:
                kept = along_columns(read_global_rows(carry_refs[0].at[b, h, n]), memory)
            elif static.gated:
                kept = gates_s[FROM_START, CHUNK - 1]
            # What the memory holds for queries and read keys, then both products with what is missing.
            held = _products({name: [(now[name], state_s)] for name in ("k", "q") if name in now})
            if static.gated:
                held = {name: x * row_scale(gates_s.at[FROM_START], x) for name, x in held.items()}
            residual = read(now["v"])
            if static.erase:
                residual = residual - held["k"]
            residual = residual * row_scale(gates_s.at[BETA], residual)
            residual_s[...] = residual.astype(dtype)
            # With erase the scale to the end of the chunk is in the write keys.
            scaled_s = residual_s
            if static.gated and not static.erase:
                scaled_s = write_s
                write_s[...] = (residual * row_scale(gates_s.at[TO_END], residual)).astype(dtype)
            plgpu.commit_smem()
            terms = {"w": [(now["w"].T, scaled_s)]}
            if keep == "outputs":
                terms["out"] = [(now["scores"], residual_s)]
            elif keep == "states" and static.erase:
                terms["write"] = [(now["inverse"], residual_s), (now["rest"], residual_s)]
            results = _products(terms)
            rows = pl.ds(n * CHUNK, CHUNK)
            if keep == "outputs":
                out_s[...] = (held["q"] * static.scale + results["out"]).astype(dtype)
            elif keep == "states":
                split(results.get("write", residual), out_s, rest_s)
            plgpu.commit_smem()
            if keep != "final":
                plgpu.copy_smem_to_gmem(out_s, out_refs[0].at[b, rows, h, columns])
            if keep == "states":
                plgpu.copy_smem_to_gmem(rest_s, out_refs[2].at[b, rows, h, columns])
            if kept is not None:
                memory = memory * kept
            plgpu.wait_smem_to_gmem(0)
            return memory + results["w"]

        if stages > 1:
            load(0, 0)
        memory = read_global(initial_ref.at[b, h, :, columns])
        memory = lax.fori_loop(0, count, chunk, memory)
        if keep != "states":
            out_refs[-1][b, h, :, columns] = memory

    scratch = [
        *tiles.values(),
        tile(key_dim, width),
        tile(CHUNK, width),
        tile(CHUNK, width),
        tile(CHUNK, width),
        tile(CHUNK, width),
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
    ]
    grid = {"values": value_dim // width, "head": heads, "batch": batch}
    arguments = [*inputs.values(), *([] if carry is None else [carry]), initial]
    return launch(body, "delta_rule_recur", out, grid, scratch, static.interpret, arguments)


def _products(terms: dict[str, list[tuple[Any, Any]]]) -> dict[str, jax.Array]:
    return dict(zip(terms, products(*terms.values()), strict=True)) if terms else {}
