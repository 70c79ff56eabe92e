"""The forward scan: the state from chunk to chunk."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK, products, read, row_scale, smem, split, split_terms
from pallas_kernels.common.token_gates import BETA, FROM_START, TO_END
from pallas_kernels.delta_rule.chunk_loop import Chunk, chunk_loop, tile_width
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions


def scan(
    chunks: Chunks,
    v: jax.Array,
    initial: jax.Array,
    options: DeltaRuleOptions,
    *,
    keep: Literal["outputs", "states", "final"],
) -> Any:
    """Run the scan and return a namespace of the results that `keep` names.

    Args:
        chunks: of `prepare` or `prepare_channel_decay`.
        v: [B, T, H, V].
        initial: initial state [B, H, K, V] float32.
        options: fixed options of the kernels.
        keep: the results to write to global memory.

            "outputs": `out` [B, T, H, V] and `final`, the final state [B, H, K, V] float32.
            "final": `final` alone.
            "states", for the gradient: `written`, R = (I + A)^-1 beta (V - K S) [B, T, H, V], which each token writes
            under its key, in the type of v; `states`, the state before each chunk [B, H, N, K, V]; `written_low`, the
            low half of R.
    """
    q, k, w, gates, carry, scores, solved, inverse = chunks
    batch, length, heads, value_dim = v.shape
    key_dim, dtype = q.shape[3], v.dtype
    values = jax.ShapeDtypeStruct(v.shape, dtype)
    states = jax.ShapeDtypeStruct((batch, heads, length // CHUNK, key_dim, value_dim), dtype)
    final = jax.ShapeDtypeStruct(initial.shape, jnp.float32)
    out = {
        "outputs": {"out": values, "final": final},
        "states": {"written": values, "states": states, "written_low": values},
        "final": {"final": final},
    }[keep]
    inputs = {"w": w if solved is None else solved, "v": v, "gates": gates}
    if keep == "outputs":
        inputs |= {"q": q, "scores": scores}
    if options.erase:
        inputs["k"] = k
    if keep == "states" and inverse is not None:
        inputs |= {"inverse": inverse[0], "inverse_low": inverse[1]}
    solve = "inverse" in inputs

    def step(chunk: Chunk, state: jax.Array, target: Any, shared: Any) -> jax.Array:
        if keep == "states":
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # the previous state is stored, R not yet
        shared.state[...] = state.astype(dtype)
        plgpu.commit_smem()
        if keep == "states":
            plgpu.copy_smem_to_gmem(shared.state, target.states.at[chunk.states])
        tiles, kept = chunk.arrive()
        gates = tiles["gates"]
        # Read the state with queries and read keys, then multiply both by the residual.
        recalled = _products({name: [(tiles[name], shared.state)] for name in ("k", "q") if name in tiles})
        if options.gated:
            recalled = {name: x * row_scale(gates.at[FROM_START], x) for name, x in recalled.items()}
        residual = read(tiles["v"])
        if options.erase:
            residual = residual - recalled["k"]
        residual = residual * row_scale(gates.at[BETA], residual)
        if solve:
            split(residual, shared.residual, shared.residual_low)
        else:
            shared.residual[...] = residual.astype(dtype)
        # With erase the decay to the end of the chunk is already in the write keys.
        until_end = shared.residual
        if options.gated and not options.erase:
            until_end = shared.until_end
            until_end[...] = (residual * row_scale(gates.at[TO_END], residual)).astype(dtype)
        plgpu.commit_smem()
        terms = {"state": [(tiles["w"].T, until_end)]}
        if keep == "outputs":
            terms["out"] = [(tiles["scores"], shared.residual)]
        elif solve:
            halves = (tiles["inverse"], tiles["inverse_low"])
            terms["written"] = split_terms(halves, (shared.residual, shared.residual_low))
        results = _products(terms)
        plgpu.wait_smem_to_gmem(int(keep == "states"), wait_read_only=True)  # all other stores of the previous chunk
        if keep == "outputs":
            shared.out[...] = (recalled["q"] * options.scale + results["out"]).astype(dtype)
        elif keep == "states":
            split(results.get("written", residual), shared.out, shared.out_low)
        plgpu.commit_smem()
        if keep == "outputs":
            plgpu.copy_smem_to_gmem(shared.out, target.out.at[chunk.rows])
        elif keep == "states":
            plgpu.copy_smem_to_gmem(shared.out, target.written.at[chunk.rows])
            plgpu.copy_smem_to_gmem(shared.out_low, target.written_low.at[chunk.rows])
        if kept is not None:
            state = state * kept
        return state + results["state"]

    width = tile_width(key_dim)
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    names = ("residual", "residual_low", "until_end", "out", "out_low")
    return chunk_loop(
        "delta_rule_recur",
        step,
        inputs=inputs,
        carry=carry,
        initial=initial,
        out=out,
        scratch={"state": tile(key_dim, width), **dict.fromkeys(names, tile(CHUNK, width))},
        options=options,
    )


def _products(terms: dict[str, list[tuple[Any, Any]]]) -> dict[str, jax.Array]:
    return dict(zip(terms, products(*terms.values()), strict=True)) if terms else {}
