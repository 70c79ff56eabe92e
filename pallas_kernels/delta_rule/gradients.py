"""Gradients of q, k, w and gates inside each chunk, from the results of both scans. Parallel over chunks."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import pair_decay, pair_rows_of, pair_rows_tile
from pallas_kernels.common.launch import BlockIndex, Phases, launch
from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
    indices,
    products,
    read,
    row_scale,
    smem,
    split,
    split_terms,
    zero_rows,
)
from pallas_kernels.common.token_gates import BETA, FROM_START, GATES, TO_END
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions
from pallas_kernels.delta_rule.scan_backward import BackwardScan

# Rows of `ChunkGradients.sums`.
D_CUMULATIVE, D_END, Z_WRITTEN = range(3)
_SUMS = 3


class ChunkGradients(NamedTuple):
    """Gradients by value head, for the caller to add up over the heads that share a key head."""

    # dq, dk (with erase) and dw [B, T, H, K], in the type of q, or float32 if several value heads share a key head.
    # Under a decay per channel they are those of the decayed q, k and w, without the terms from the same chunk.
    d_keys: list[jax.Array]
    # Sums over each slab of 64 key channels [B, H, N, K / 64, 3, 64] float32: D_CUMULATIVE of <q, dq> + <k, dk> -
    # <w, dw>; D_END of the terms of <w, dw> that reach later chunks; Z_WRITTEN of Z R, over values.
    sums: jax.Array
    # Of the decay of the state over a chunk: sums of S dS over values [B, H, N, K] float32.
    d_carry: jax.Array
    # Under a decay per channel: of <q, w> and, with erase, <k, w> within a chunk [B, H, N, 64, 64]. Else empty.
    d_pairs: list[jax.Array]


def gradients(
    chunks: Chunks,
    d_out: jax.Array,
    written: list[jax.Array],
    backward: BackwardScan,
    states: jax.Array,
    options: DeltaRuleOptions,
) -> ChunkGradients:
    """Return the terms of the gradients of the inputs.

    Matrices may come as two halves (high, low): with nearly parallel keys R alternates in sign, as do Z and the
    gradient of the state, and sums of them are far smaller than their terms.

    Args:
        chunks: inputs of the scans.
        d_out: gradient of the outputs [B, T, H, V].
        written: R, of `scan`, as one or two halves.
        backward: of `scan_backward`, whose matrices are one or two halves.
        states: of `scan`.
        options: fixed options of the kernels.
    """
    q, k, w, gates, carry, *_ = chunks
    inside = carry is None
    batch, length, heads, value_dim = d_out.shape
    key_dim, count, dtype = q.shape[3], length // CHUNK, q.dtype
    ungrouped = heads == q.shape[2] == w.shape[2]
    d_key = jax.ShapeDtypeStruct((batch, length, heads, key_dim), dtype if ungrouped else jnp.float32)
    d_pair = jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), dtype)
    # By name, a matrix or the halves that it is the sum of.
    matrices = {"q": [q], "k": [k], "w": [w], "d_out": [d_out], "written": written, "z": backward.z}
    matrices |= {"states": [states], "d_states": backward.d_states}
    if not options.erase:
        del matrices["k"]

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        d_out_s, result_s = shared.matrices.d_out[0].d_out, shared.matrices.d_out[0].result
        tiles = vars(shared.matrices) | {"d_out": [d_out_s]}
        tile = {name: halves[0] for name, halves in tiles.items()}
        d_scores_s, d_lower_s, gates_s, sums_s = shared.d_scores, shared.d_lower, shared.gates, shared.sums
        b, h, n, slab = index("batch", "head", "chunk", "slab")
        rows, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(slab * SLAB, SLAB)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        indices_of: dict[str, tuple[Any, ...]] = {"w": (b, rows, write_head, channels)}
        indices_of |= dict.fromkeys(("q", "k"), (b, rows, key_head, channels))
        indices_of |= dict.fromkeys(("d_out", "written", "z"), (b, rows, h))
        indices_of |= dict.fromkeys(("states", "d_states"), (b, h, n, channels))
        for name, halves in vars(source.matrices).items():
            for ref, half in zip(halves, tiles[name], strict=True):
                plgpu.copy_gmem_to_smem(ref.at[indices_of[name]], half, shared.loaded)
        plgpu.copy_gmem_to_smem(source.gates.at[b, h, n], gates_s, shared.loaded)
        plgpu.copy_gmem_to_smem(pair_rows_of(source.gates.at[b, h, n]), shared.pair_rows, shared.loaded)
        plgpu.barrier_wait(shared.loaded)

        def store(value: jax.Array, ref: Any) -> None:
            if d_key.dtype == jnp.float32:
                ref[b, rows, h, channels] = value
                return
            plgpu.wait_smem_to_gmem(0)
            result_s[...] = value.astype(d_key.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result_s, ref.at[b, rows, h, channels])

        def scaled(x: jax.Array, gate: int) -> jax.Array:
            return x * row_scale(gates_s.at[gate], x) if options.gated else x

        def times(a: str, b: str) -> jax.Array:
            """Return a b^T."""
            return products([(x, y.T) for x, y in split_terms(tiles[a], tiles[b])])[0]

        # Within the chunk: the gradients of <q, w> in P and of <k, w> in A. In two halves, because large terms of both
        # signs meet in the gradient of a decay. Both factors receive the same values, so that the pairs on one side of
        # a decay cancel in it.
        decay = pair_decay(gates_s, shared.pair_rows, decay=options.decay, resets=options.resets)
        split(times("d_out", "written") * (decay * options.scale), d_scores_s.at[0], d_scores_s.at[1])
        if options.erase:
            i, j = indices((CHUNK, CHUNK))
            d_lower = times("z", "written") * jnp.where(i > j, -decay, 0.0)
            split(d_lower * row_scale(gates_s.at[BETA], d_lower), d_lower_s.at[0], d_lower_s.at[1])
        plgpu.commit_smem()
        if not inside:

            @pl.when(slab == 0)
            def _() -> None:
                for d_pairs_s, ref in zip((d_scores_s.at[0], d_lower_s.at[0]), target.d_pairs, strict=False):
                    plgpu.copy_smem_to_gmem(d_pairs_s, ref.at[b, h, n])

        d_q = scaled(times("d_out", "states") * options.scale, FROM_START)
        if inside:
            d_q = d_q + products([(d_scores_s.at[half], tile["w"]) for half in (0, 1)])[0]
        store(d_q, target.d_keys[0])
        cumulative = jnp.sum(read(tile["q"]) * d_q, axis=1)

        if options.erase:
            d_k = -scaled(times("z", "states"), FROM_START)
            d_k = d_k * row_scale(gates_s.at[BETA], d_k)
            if inside:
                d_k = d_k + products([(d_lower_s.at[half], tile["w"]) for half in (0, 1)])[0]
            store(d_k, target.d_keys[1])
            cumulative = cumulative + jnp.sum(read(tile["k"]) * d_k, axis=1)

        sums_s[Z_WRITTEN, ...] = _row_products(tiles["z"], tiles["written"])
        d_w = scaled(times("written", "d_states"), TO_END)
        sums_s[D_END, ...] = jnp.sum(read(tile["w"]) * d_w, axis=1)
        if inside:
            pairs = [(d_scores_s.at[half].T, tile["q"]) for half in (0, 1)]
            if options.erase:
                pairs += [(d_lower_s.at[half].T, tile["k"]) for half in (0, 1)]
            d_w = d_w + products(pairs)[0]
        store(d_w, target.d_keys[-1])
        sums_s[D_CUMULATIVE, ...] = cumulative - jnp.sum(read(tile["w"]) * d_w, axis=1)
        shared.d_carry[...] = _row_products(tiles["states"], tiles["d_states"])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_s, target.sums.at[b, h, n, slab])
        plgpu.copy_smem_to_gmem(shared.d_carry, target.d_carry.at[b, h, n, channels])
        plgpu.wait_smem_to_gmem(0)

    keys, values = smem(CHUNK, SLAB, dtype=dtype), smem(CHUNK, value_dim, dtype=dtype)
    # d_out is dead once dq is computed, the first result: the results reuse its memory.
    tile_types = {"q": keys, "k": keys, "w": keys, "d_out": Phases(d_out=values, result=keys)}
    results = launch(
        body,
        "delta_rule_gradients",
        inputs={"matrices": matrices, "gates": gates},
        out={
            "d_keys": [d_key] * (2 + options.erase),
            "sums": jax.ShapeDtypeStruct((batch, heads, count, key_dim // SLAB, _SUMS, CHUNK), jnp.float32),
            "d_carry": jax.ShapeDtypeStruct((batch, heads, count, key_dim), jnp.float32),
            "d_pairs": [] if inside else [d_pair] * (1 + options.erase),
        },
        scratch={
            "matrices": {name: [tile_types.get(name, values)] * len(halves) for name, halves in matrices.items()},
            "d_scores": smem(2, CHUNK, CHUNK, dtype=dtype),
            "d_lower": smem(2, CHUNK, CHUNK, dtype=dtype),
            "gates": plgpu.SMEM((GATES, CHUNK), jnp.float32),
            "pair_rows": pair_rows_tile(),
            "sums": plgpu.SMEM((_SUMS, CHUNK), jnp.float32),
            "d_carry": plgpu.SMEM((SLAB,), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=sum(map(len, matrices.values())) + 2),
        },
        grid={"batch": batch, "chunk": count, "slab": key_dim // SLAB, "head": heads},
        interpret=options.interpret,
    )
    return ChunkGradients(results.d_keys, results.sums, results.d_carry, results.d_pairs)


def _row_products(a: Sequence[Any], b: Sequence[Any]) -> jax.Array:
    """Return the sums over columns of a * b, each the sum of its halves.

    It adds 64 columns at a time: more would not fit in registers.
    """

    def add(block: Any, sums: jax.Array) -> jax.Array:
        columns = pl.ds(block * 64, 64)
        x, y = (functools.reduce(jnp.add, [read(half.at[:, columns]) for half in halves]) for halves in (a, b))
        return sums + jnp.sum(x * y, axis=1)

    return lax.fori_loop(0, a[0].shape[1] // 64, add, zero_rows(a[0].shape[0]))
