"""Gradients of keys, queries and gates inside each chunk, once both recurrences have run. Parallel over all chunks."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import BETA, FROM_START, GATES, TO_END, pair_decay, pair_rows_of, pair_rows_tile
from pallas_kernels.common.launch import launch_flat
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
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions
from pallas_kernels.delta_rule.scan_backward import Back

# Rows of the sums over key channels that it returns, [SUMS, 64] float32.
D_CUMULATIVE, D_END, Z_WRITE = range(3)
SUMS = 3


def gradients(
    chunks: Chunks, d_out: jax.Array, write: list[jax.Array], back: Back, states: jax.Array, options: DeltaRuleOptions
) -> list[jax.Array]:
    """Gradients by value head, and sums over parts of 64 key channels, which the caller adds up.

    Under a decay per channel dq, dk and dw are those of the decayed q, k and w, without what comes from the same chunk:
    of that, the gradients of the products <q, w> and <k, w> follow as two more results [B, H, N, 64, 64], the latter
    only with erase.

    Returns:
        dq, dk, dw [B, T, H, K] (without erase no dk), in the type of q, or float32 where several value heads share a
        key head; sums over key channels [B, H, N, K / 64, SUMS, 64] float32: D_CUMULATIVE of <q, dq> + <k, dk> -
        <w, dw>, D_END of the part of <w, dw> that reaches later chunks, and Z_WRITE of Z R over values; sums of S dS
        over values, the gradient of what a chunk keeps, [B, H, N, K] float32.

    Args:
        chunks: what the recurrences read.
        d_out: gradient of the outputs [B, T, H, V].
        write: R, of `scan`, and where it is given what rounding takes off it: beside near-parallel keys R alternates,
            and sums of it are far smaller than its terms. So do the matrices of `back` that come in two halves.
        back: of `scan_backward`.
        states: of `scan`.
        options: fixed options of the kernels.
    """
    q, k, w, gates, carry, *_ = chunks
    inside = carry is None
    batch, length, heads, value_dim = d_out.shape
    key_dim, count, dtype = q.shape[3], length // CHUNK, q.dtype
    alone = heads == q.shape[2] == w.shape[2]
    result = jax.ShapeDtypeStruct((batch, length, heads, key_dim), dtype if alone else jnp.float32)
    out = [result] * (2 + options.erase)
    out += [jax.ShapeDtypeStruct((batch, heads, count, key_dim // SLAB, SUMS, CHUNK), jnp.float32)]
    out += [jax.ShapeDtypeStruct((batch, heads, count, key_dim), jnp.float32)]
    pair_results = 0 if inside else 1 + options.erase
    out += [jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), dtype)] * pair_results
    # By name a matrix, or the halves that it is the sum of.
    inputs = {"q": [q], "k": [k], "w": [w], "d_out": [d_out], "write": write, "z": back.z}
    inputs |= {"states": [states], "d_states": back.d_states}
    if not options.erase:
        del inputs["k"]
    flat = [x for halves in inputs.values() for x in halves]

    def body(at: Any, *refs: Any) -> None:
        left = iter(refs)
        source = {name: [next(left) for _ in halves] for name, halves in inputs.items()}
        gates_ref, *out_refs = itertools.islice(left, 1 + len(out))
        tiles = {name: [next(left) for _ in halves] for name, halves in inputs.items()}
        p_s, a_s, gates_s, pair_rows_s, sums_s, keep_s, loaded = left
        tile = {name: halves[0] for name, halves in tiles.items()}
        tile["d_out"], out_s = tile["d_out"]
        tiles["d_out"] = [tile["d_out"]]
        b, h, n, c = at("batch", "head", "chunk", "part")
        rows, channels = pl.ds(n * CHUNK, CHUNK), pl.ds(c * SLAB, SLAB)
        key_head, write_head = lax.div(h, heads // q.shape[2]), lax.div(h, heads // w.shape[2])
        where: dict[str, tuple[Any, ...]] = {"w": (b, rows, write_head, channels)}
        where |= dict.fromkeys(("q", "k"), (b, rows, key_head, channels))
        where |= dict.fromkeys(("d_out", "write", "z"), (b, rows, h))
        where |= dict.fromkeys(("states", "d_states"), (b, h, n, channels))
        for name, halves in source.items():
            for ref, target in zip(halves, tiles[name], strict=True):
                plgpu.copy_gmem_to_smem(ref.at[where[name]], target, loaded)
        plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates_s, loaded)
        plgpu.copy_gmem_to_smem(pair_rows_of(gates_ref.at[b, h, n]), pair_rows_s, loaded)
        plgpu.barrier_wait(loaded)

        def write_out(value: jax.Array, ref: Any) -> None:
            if result.dtype == jnp.float32:
                ref[b, rows, h, channels] = value
                return
            plgpu.wait_smem_to_gmem(0)
            out_s[...] = value.astype(result.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, ref.at[b, rows, h, channels])

        def scaled(x: jax.Array, gate: int) -> jax.Array:
            return x * row_scale(gates_s.at[gate], x) if options.gated else x

        def times(a: str, b: str) -> jax.Array:
            """a b^T."""
            return products([(x, y.T) for x, y in split_terms(tiles[a], tiles[b])])[0]

        # Inside the chunk: p is the gradient of P's products <q, w>, a that of A's <k, w>. In two halves, since in the
        # gradient of a decay large terms of both signs meet. The same numbers reach both factors, so that the pairs on
        # one side of a decay cancel in it.
        decay = pair_decay(gates_s, pair_rows_s, decay=options.decay, resets=options.resets)
        split(times("d_out", "write") * (decay * options.scale), p_s.at[0], p_s.at[1])
        if options.erase:
            i, j = indices((CHUNK, CHUNK))
            d_lower = times("z", "write") * jnp.where(i > j, -decay, 0.0)
            split(d_lower * row_scale(gates_s.at[BETA], d_lower), a_s.at[0], a_s.at[1])
        plgpu.commit_smem()
        sums_ref, keep_ref, *pairs_refs = out_refs[2 + options.erase :]
        if not inside:

            @pl.when(c == 0)
            def _() -> None:
                for pairs_s, ref in zip((p_s.at[0], a_s.at[0]), pairs_refs, strict=False):
                    plgpu.copy_smem_to_gmem(pairs_s, ref.at[b, h, n])

        d_q = scaled(times("d_out", "states") * options.scale, FROM_START)
        if inside:
            d_q = d_q + products([(p_s.at[half], tile["w"]) for half in (0, 1)])[0]
        write_out(d_q, out_refs[0])
        cumulative = jnp.sum(read(tile["q"]) * d_q, axis=1)

        if options.erase:
            d_k = -scaled(times("z", "states"), FROM_START)
            d_k = d_k * row_scale(gates_s.at[BETA], d_k)
            if inside:
                d_k = d_k + products([(a_s.at[half], tile["w"]) for half in (0, 1)])[0]
            write_out(d_k, out_refs[1])
            cumulative = cumulative + jnp.sum(read(tile["k"]) * d_k, axis=1)

        sums_s[Z_WRITE, ...] = _row_products(tiles["z"], tiles["write"])
        d_w = scaled(times("write", "d_states"), TO_END)
        sums_s[D_END, ...] = jnp.sum(read(tile["w"]) * d_w, axis=1)
        if inside:
            pairs = [(p_s.at[half].T, tile["q"]) for half in (0, 1)]
            if options.erase:
                pairs += [(a_s.at[half].T, tile["k"]) for half in (0, 1)]
            d_w = d_w + products(pairs)[0]
        write_out(d_w, out_refs[1 + options.erase])
        sums_s[D_CUMULATIVE, ...] = cumulative - jnp.sum(read(tile["w"]) * d_w, axis=1)
        keep_s[...] = _row_products(tiles["states"], tiles["d_states"])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_s, sums_ref.at[b, h, n, c])
        plgpu.copy_smem_to_gmem(keep_s, keep_ref.at[b, h, n, channels])
        plgpu.wait_smem_to_gmem(0)

    keys, values = smem(CHUNK, SLAB, dtype=dtype), smem(CHUNK, value_dim, dtype=dtype)
    # When the first result is there, the gradients of the outputs have served.
    kinds = {"q": keys, "k": keys, "w": keys, "d_out": plgpu.RefUnion(values, keys)}
    scratch = [
        *(kinds.get(name, values) for name, halves in inputs.items() for _ in halves),
        *[smem(2, CHUNK, CHUNK, dtype=dtype)] * 2,
        plgpu.SMEM((GATES, CHUNK), jnp.float32),
        pair_rows_tile(),
        plgpu.SMEM((SUMS, CHUNK), jnp.float32),
        plgpu.SMEM((SLAB,), jnp.float32),
        plgpu.Barrier(num_arrivals=len(flat) + 2),
    ]
    grid = {"batch": batch, "chunk": count, "part": key_dim // SLAB, "head": heads}
    arguments = [*flat, gates]
    return launch_flat(body, "delta_rule_gradients", out, grid, scratch, options.interpret, arguments)


def _row_products(a: Sequence[Any], b: Sequence[Any]) -> jax.Array:
    """Sums over columns of a * b, each the sum of its halves, 64 columns at a time: all would not fit in registers."""

    def add(piece: Any, sums: jax.Array) -> jax.Array:
        columns = pl.ds(piece * 64, 64)
        x, y = (functools.reduce(jnp.add, [read(half.at[:, columns]) for half in halves]) for halves in (a, b))
        return sums + jnp.sum(x * y, axis=1)

    return lax.fori_loop(0, a[0].shape[1] // 64, add, zero_rows(a[0].shape[0]))
