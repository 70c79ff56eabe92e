"""The backward scan: the gradient of the state from the last chunk to the first, kept in registers."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK, products, read, row_scale, smem, split
from pallas_kernels.common.token_gates import BETA, FROM_START, TO_END
from pallas_kernels.delta_rule.chunk_loop import Chunk, chunk_loop, tile_width
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions


class BackwardScan(NamedTuple):
    """Gradients that depend on later chunks."""

    d_v: jax.Array  # [B, T, H, V]
    z: list[jax.Array]  # Z = (I + A)^-T dR, the gradient of beta (V - K S) [B, T, H, V]; with_low: and its low half
    d_states: list[jax.Array]  # of the state after each chunk [B, H, N, K, V]; with_low: and its low half
    d_initial: jax.Array  # of the initial state [B, H, K, V] float32


def scan_backward(
    chunks: Chunks, d_out: jax.Array, d_final: jax.Array, options: DeltaRuleOptions, *, with_low: bool = False
) -> BackwardScan:
    """Run the scan of the gradient.

    Args:
        chunks: as for `scan`, prepared for a gradient.
        d_out: gradient of the outputs [B, T, H, V].
        d_final: gradient of the final state [B, H, K, V] float32.
        options: fixed options of the kernels.
        with_low: return the low halves of z and d_states too.
    """
    q, k, w, gates, carry, scores, solved, _ = chunks
    batch, length, heads, value_dim = d_out.shape
    key_dim, dtype, halves = q.shape[3], d_out.dtype, 1 + with_low
    values = jax.ShapeDtypeStruct(d_out.shape, dtype)
    d_states = jax.ShapeDtypeStruct((batch, heads, length // CHUNK, key_dim, value_dim), dtype)
    inputs = {"q": q, "k": k, "w": w if solved is None else solved, "d_out": d_out, "gates": gates, "scores": scores}
    if solved is None:
        del inputs["k"]

    def step(chunk: Chunk, d_state: jax.Array, target: Any, shared: Any) -> jax.Array:
        plgpu.wait_smem_to_gmem(halves + 1, wait_read_only=True)  # the later d_state is stored, z and d_v not yet
        split(d_state, shared.state.at[0], shared.state.at[1])
        plgpu.commit_smem()
        for half, ref in enumerate(target.d_states):
            plgpu.copy_smem_to_gmem(shared.state.at[half], ref.at[chunk.states])
        tiles, kept = chunk.arrive()
        gates = tiles["gates"]
        from_later, from_inside = products(
            [(tiles["w"], shared.state.at[0]), (tiles["w"], shared.state.at[1])],
            [(tiles["scores"].T, tiles["d_out"])],
        )
        if options.gated and not options.erase:  # with erase the decay is already in the write keys
            from_later = from_later * row_scale(gates.at[TO_END], from_later)
        z = from_later + from_inside
        plgpu.wait_smem_to_gmem(halves, wait_read_only=True)  # all other stores of the chunk after
        if with_low:
            split(z, shared.z.at[0], shared.z.at[1])
        else:
            shared.z[0, ...] = z.astype(dtype)
        d_v = z * row_scale(gates.at[BETA], z)
        shared.d_v[...] = d_v.astype(dtype)
        d_read = read(tiles["d_out"]) * options.scale
        if options.gated:
            d_read = d_read * row_scale(gates.at[FROM_START], d_read)
            d_v = d_v * row_scale(gates.at[FROM_START], d_v)
        shared.d_reads[0, ...] = d_read.astype(dtype)
        if options.erase:
            shared.d_reads[1, ...] = (-d_v).astype(dtype)
        plgpu.commit_smem()
        for half, ref in enumerate(target.z):
            plgpu.copy_smem_to_gmem(shared.z.at[half], ref.at[chunk.rows])
        plgpu.copy_smem_to_gmem(shared.d_v, target.d_v.at[chunk.rows])
        pairs = [(tiles["q"].T, shared.d_reads.at[0])]
        if options.erase:
            pairs += [(tiles["k"].T, shared.d_reads.at[1])]
        (added,) = products(pairs)
        plgpu.commit_smem()  # the tiles are dead: those of the chunk after next may overwrite them
        if kept is not None:
            d_state = d_state * kept
        return d_state + added

    width = tile_width(key_dim)
    tile = functools.partial(smem, dtype=dtype, swizzle=2 * width)
    results = chunk_loop(
        "delta_rule_recur_back",
        step,
        inputs=inputs,
        carry=carry,
        initial=d_final,
        out={
            "d_v": values,
            "z": [values] * halves,
            "d_states": [d_states] * halves,
            "final": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        },
        scratch={
            "state": tile(2, key_dim, width),
            "z": tile(halves, CHUNK, width),
            "d_reads": tile(2, CHUNK, width),  # gradients of S^T q and S^T k
            "d_v": tile(CHUNK, width),
        },
        options=options,
        reverse=True,
    )
    return BackwardScan(results.d_v, results.z, results.d_states, results.final)
