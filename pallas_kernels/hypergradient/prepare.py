"""The part of a chunk of the hypergradient preconditioner that needs no state. Parallel over all chunks."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.inverse import SCRATCH, unit_lower_inverse
from pallas_kernels.common.launch import launch_flat
from pallas_kernels.common.tiles import (
    CHUNK,
    column_scale,
    products,
    read,
    row_scale,
    smem,
    split,
    split_terms,
    zero_rows,
)
from pallas_kernels.hypergradient import chunk as parts
from pallas_kernels.hypergradient.chunk import BETA, GATES, LEAD, PIECE, STEP, Static


def prepare(k: jax.Array, gates: jax.Array, cotangent: jax.Array | None, static: Static) -> list[jax.Array]:
    """(I + L)^-1 of every chunk, [B, P, N, 64, 64] float32, and for the gradient what the cotangents of d add.

    With g the cotangents of d, they add sum_{j > i} E_ji <u_i, g_j> to the cotangent of token i's coefficient,
    [B, P, N, 64], and sum_j lead_j g_j to that of the state before the chunk, [B, P, N, K].

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        cotangent: of d, [B, T, P, K] float32, or with `static.multiply` of d k, in the type of k; or None.
        static: the options.
    """
    batch, _, heads, size = k.shape
    count, pieces = gates.shape[2], size // PIECE
    backward = cotangent is not None
    inputs = [k, gates] if cotangent is None else [k, gates, cotangent]
    shapes = [(CHUNK, CHUNK), (CHUNK,), (size,)] if backward else [(CHUNK, CHUNK)]
    out = [jax.ShapeDtypeStruct((batch, heads, count, *shape), jnp.float32) for shape in shapes]

    def body(at: Any, *refs: Any) -> None:
        ins, outs, scoped = refs[: len(inputs)], refs[len(inputs) :][: len(out)], refs[len(inputs) + len(out) :]
        k_s, gates_s, again_s, adds_s, state_s, loaded, g_loaded, g_s, shared = scoped
        (u,), inverse_s, (x_s, left, g) = shared
        inverse_s = SimpleNamespace(**dict(zip(SCRATCH, inverse_s, strict=True)))
        left, g = parts.at(left, 0), parts.at(g, 0)
        b, p, n = at("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)
        for piece in range(pieces):
            plgpu.copy_gmem_to_smem(ins[0].at[b, rows, p, parts.channels(piece)], k_s.at[piece], loaded)
            if backward:
                plgpu.copy_gmem_to_smem(ins[2].at[b, rows, p, parts.channels(piece)], g_s.at[piece], g_loaded)
        plgpu.copy_gmem_to_smem(ins[1].at[b, p, n], gates_s, loaded)
        plgpu.copy_gmem_to_smem(parts.sums_of(ins[1].at[b, p, n]), again_s, loaded)
        plgpu.barrier_wait(loaded)
        for piece in range(pieces):
            split(parts.squares(k_s.at[piece]), *parts.at(u, piece))
        plgpu.commit_smem()
        pairs: list[tuple[Any, Any]] = []
        for piece in range(pieces):
            pairs += [(a, b.T) for a, b in split_terms(parts.at(u, piece), parts.at(u, piece))]
        lower = products(pairs)[0] * parts.left_before(gates_s, again_s, static)
        lower = lower * row_scale(gates_s.at[BETA], lower) * column_scale(gates_s.at[STEP], lower)
        plgpu.commit_smem()  # the squared keys have served
        inverse = unit_lower_inverse(lower, inverse_s)
        plgpu.commit_smem()  # so has the inverse's memory
        x_s[...] = inverse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, outs[0].at[b, p, n])
        if backward:
            split(parts.left_after(gates_s, again_s, static), *left)
            plgpu.barrier_wait(g_loaded)

            def add(piece: Any, adds: jax.Array) -> jax.Array:
                cotangents = read(g_s.at[piece])
                if static.multiply:
                    cotangents = cotangents * read(k_s.at[piece])
                split(cotangents, *g)
                if static.forget:
                    cotangents = cotangents * row_scale(gates_s.at[LEAD], cotangents)
                state_s[parts.channels(piece)] = jnp.sum(cotangents, axis=0)
                plgpu.commit_smem()
                added = products(split_terms(left, g, short=not static.forget))[0]
                plgpu.commit_smem()  # the operands have served
                return adds + jnp.sum(added * parts.squares(k_s.at[piece]), axis=1)

            adds_s[...] = parts.over(pieces, add, zero_rows(CHUNK))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(adds_s, outs[1].at[b, p, n])
            plgpu.copy_smem_to_gmem(state_s, outs[2].at[b, p, n])
        plgpu.wait_smem_to_gmem(0)

    half = parts.halves(1)
    # One after the other: what the inverse is of, what it works in, what is written and what the cotangents work in.
    shared = plgpu.RefUnion(
        [parts.halves(pieces)], [*SCRATCH.values()], [smem(CHUNK, CHUNK, dtype=jnp.float32), half, half]
    )
    scratch: Sequence[Any] = [
        smem(pieces, CHUNK, PIECE, dtype=k.dtype),
        plgpu.SMEM((GATES, CHUNK), jnp.float32),
        parts.again_tile(),
        plgpu.SMEM((CHUNK,), jnp.float32),
        plgpu.SMEM((size,), jnp.float32),
        plgpu.Barrier(num_arrivals=pieces + 2),
        plgpu.Barrier(num_arrivals=pieces),
        plgpu.SMEM((1,), jnp.float32) if cotangent is None else smem(pieces, CHUNK, PIECE, dtype=cotangent.dtype),
        shared,
    ]
    grid = {"batch": batch, "chunk": count, "head": heads}
    return list(launch_flat(body, "hypergradient_prepare", out, grid, scratch, static.interpret, inputs))
