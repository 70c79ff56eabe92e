"""The delta rule from chunk to chunk."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import BETA, FROM_START, TO_END
from pallas_kernels.common.tiles import CHUNK, products, read, row_scale, smem, split, split_terms
from pallas_kernels.delta_rule.chunk_loop import Chunk, chunk_loop, tile_width
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions


def scan(
    chunks: Chunks,
    v: jax.Array,
    initial: jax.Array,
    options: DeltaRuleOptions,
    *,
    keep: Literal["outputs", "states", "final"],
) -> list[jax.Array]:
    """The recurrence, and what is to be kept of it.

    Returns:
        "outputs": outputs [B, T, H, V] and the final memory [B, H, K, V] float32; "final": the latter alone; "states",
        for the gradient: R = (I + A)^-1 beta (V - K S) [B, T, H, V], which is what each token writes under its key, in
        the type of v; the memory before each chunk [B, H, N, K, V]; what rounding takes off R.

    Args:
        chunks: of `prepare` or `prepare_channel_decay`.
        v: [B, T, H, V].
        initial: [B, H, K, V] float32.
        options: fixed options of the kernels.
        keep: see above.
    """
    q, k, w, gates, carry, scores, solved, inverse = chunks
    batch, length, heads, value_dim = v.shape
    key_dim, dtype = q.shape[3], v.dtype
    each = jax.ShapeDtypeStruct(v.shape, dtype)
    states = jax.ShapeDtypeStruct((batch, heads, length // CHUNK, key_dim, value_dim), dtype)
    final = jax.ShapeDtypeStruct(initial.shape, jnp.float32)
    out = {"outputs": [each, final], "states": [each, states, each], "final": [final]}[keep]
    inputs = {"w": w if solved is None else solved, "v": v, "gates": gates}
    if keep == "outputs":
        inputs |= {"q": q, "scores": scores}
    if options.erase:
        inputs["k"] = k
    solve = keep == "states" and options.erase
    if inverse is not None and solve:
        inputs |= zip(("inverse", "rest"), inverse, strict=True)

    def step(chunk: Chunk, memory: jax.Array, out_refs: Sequence[Any], scratch: Sequence[Any]) -> jax.Array:
        state_s, residual_s, fine_s, write_s, out_s, rest_s = scratch
        if keep == "states":
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # the chunk before's memory, but not what it wrote
        state_s[...] = memory.astype(dtype)
        plgpu.commit_smem()
        if keep == "states":
            plgpu.copy_smem_to_gmem(state_s, out_refs[1].at[chunk.states])
        now, kept = chunk.arrive()
        gates_s = now["gates"]
        # What the memory holds for queries and read keys, then both products with what is missing.
        held = _products({name: [(now[name], state_s)] for name in ("k", "q") if name in now})
        if options.gated:
            held = {name: x * row_scale(gates_s.at[FROM_START], x) for name, x in held.items()}
        residual = read(now["v"])
        if options.erase:
            residual = residual - held["k"]
        residual = residual * row_scale(gates_s.at[BETA], residual)
        if solve:
            split(residual, residual_s, fine_s)
        else:
            residual_s[...] = residual.astype(dtype)
        # With erase the scale to the end of the chunk is in the write keys.
        scaled_s = residual_s
        if options.gated and not options.erase:
            scaled_s = write_s
            write_s[...] = (residual * row_scale(gates_s.at[TO_END], residual)).astype(dtype)
        plgpu.commit_smem()
        terms = {"w": [(now["w"].T, scaled_s)]}
        if keep == "outputs":
            terms["out"] = [(now["scores"], residual_s)]
        elif solve:
            terms["write"] = split_terms((now["inverse"], now["rest"]), (residual_s, fine_s))
        results = _products(terms)
        plgpu.wait_smem_to_gmem(int(keep == "states"), wait_read_only=True)  # all else of the chunk before
        if keep == "outputs":
            out_s[...] = (held["q"] * options.scale + results["out"]).astype(dtype)
        elif keep == "states":
            split(results.get("write", residual), out_s, rest_s)
        plgpu.commit_smem()
        if keep != "final":
            plgpu.copy_smem_to_gmem(out_s, out_refs[0].at[chunk.rows])
        if keep == "states":
            plgpu.copy_smem_to_gmem(rest_s, out_refs[2].at[chunk.rows])
        if kept is not None:
            memory = memory * kept
        return memory + results["w"]

    width = tile_width(key_dim)
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    scratch = [tile(key_dim, width), *[tile(CHUNK, width)] * 5]
    return chunk_loop("delta_rule_recur", inputs, carry, initial, out, scratch, step, options, returns=keep != "states")


def _products(terms: dict[str, list[tuple[Any, Any]]]) -> dict[str, jax.Array]:
    return dict(zip(terms, products(*terms.values()), strict=True)) if terms else {}
