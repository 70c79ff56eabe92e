"""The gradients of what a chunk reads, from the cotangent of the state after it. Parallel over all chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import launch_flat
from pallas_kernels.common.tiles import (
    CHUNK,
    along_columns,
    column_scale,
    products,
    read,
    read_rows,
    row_scale,
    smem,
    split,
    split_terms,
    zero_rows,
)
from pallas_kernels.hypergradient import chunk as parts
from pallas_kernels.hypergradient import tokens
from pallas_kernels.hypergradient.chunk import BETA, BLOCK, DRAW, FORGET, GATES, PIECE, RESTART, STEP, TO_END, Static

# Rows of the gradients of the gates of a chunk.
D_STEP, D_BETA, D_LOG_FORGET = range(3)


def gradients(
    k: jax.Array,
    gates: jax.Array,
    starts: jax.Array,
    feedback: jax.Array,
    redone: jax.Array,
    d: jax.Array | None,
    cotangent: jax.Array,
    r: jax.Array,
    after: jax.Array,
    anchor: jax.Array,
    static: Static,
) -> list[jax.Array]:
    """Cotangents of k, of step, beta and log_forget [B, P, N, 3, 64], and if anchored of anchor [B, P, N, K].

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        starts, feedback, redone: of `scan`.
        d: [B, T, P, K] float32, of `expand`; read where a chunk goes token by token. None where none does.
        cotangent: of d, or with `static.multiply` of d k.
        r, after: of `scan_backward`.
        anchor: [B, P, K].
        static: the options.
    """
    batch, length, heads, size = k.shape
    count, pieces = length // CHUNK, size // PIECE
    inputs = [k, gates, starts, feedback, redone, cotangent, r, after, anchor]
    if d is not None:
        inputs += [d]
    lead = (batch, heads, count)
    out = [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct((*lead, 3, CHUNK), jnp.float32)]
    out += [jax.ShapeDtypeStruct((*lead, size), jnp.float32)] * static.anchored

    def body(at: Any, *refs: Any) -> None:
        ins, outs, rest = refs[: len(inputs)], refs[len(inputs) :][: len(out)], refs[len(inputs) + len(out) :]
        k_ref, gates_ref, starts_ref, feedback_ref, redone_ref, cotangent_ref, r_ref, after_ref, *more = ins
        (anchor_ref, *d_ref), (d_k_ref, d_gates_ref, *d_anchor_ref) = more, outs
        tiles, gates_s, after_s, anchor_s, d_gates_s, d_anchor_s, ready, loaded, block_loaded = rest
        of_a_chunk, blocks = tiles if static.exact else (tiles, None)
        b, p, n = at("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)

        def closed_form() -> None:
            k_s, cotangent_s, again_s, start_s, feedback_s, r_s, u_and_g, weights, left = of_a_chunk
            u_and_g, weights, left = (parts.at(pair, 0) for pair in (u_and_g, weights, left))
            for piece in range(pieces):
                for ref, target in [(k_ref, k_s), (cotangent_ref, cotangent_s)]:
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, p, parts.channels(piece)], target.at[piece], loaded)
            for ref, target in [(starts_ref, start_s), (feedback_ref, feedback_s), (r_ref, r_s)]:
                plgpu.copy_gmem_to_smem(ref.at[b, p, n], target, loaded)
            plgpu.copy_gmem_to_smem(parts.sums_of(gates_ref.at[b, p, n]), again_s, loaded)
            plgpu.barrier_wait(loaded)
            split(parts.left_after(gates_s, again_s, static), *left)
            parts.weigh(feedback_s, gates_s, again_s, weights, static)

            def step(piece: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                part, keys = parts.channels(piece), k_s.at[piece]
                states = start_s.at[part], anchor_s.at[part]
                d = parts.closed_form(keys, *states, gates_s, u_and_g, weights, static)
                taken = read_rows(gates_s.at[BETA]) * read_rows(r_s)
                k = read(keys)
                predicted = jnp.sum(k * k * d, axis=1)
                g = read(cotangent_s.at[piece])
                if static.multiply:
                    g = g * k
                split(g - along_columns(taken, k) * (k * k), *u_and_g)
                plgpu.commit_smem()
                added = products(split_terms(left, u_and_g, short=not static.forget))[0]
                after = column_scale(after_s.at[part], added)
                if static.forget:
                    after = after * row_scale(gates_s.at[TO_END], after)
                after = after + added
                # Read only now, and again: over the product they would take too many registers.
                k, coefficient = read(keys), read_rows(gates_s.at[STEP]) * read_rows(feedback_s)
                d_u = along_columns(coefficient, d) * after - along_columns(taken, d) * d
                d_k = 2.0 * (k * d_u)
                if static.multiply:
                    d_k = d_k + read(cotangent_s.at[piece]) * d
                sums = (sums[0] + predicted, sums[1] + jnp.sum(after * (k * k), axis=1), *sums[2:])
                keys[...] = d_k.astype(k_ref.dtype)
                if static.anchored:
                    d = d - column_scale(anchor_s.at[part], d)
                    d_anchor_s[part] = jnp.sum(after * row_scale(gates_s.at[DRAW], after), axis=0)
                return (*sums[:2], sums[2] + jnp.sum(after * d, axis=1)) if static.forget else sums

            sums = parts.over(pieces, step, (zero_rows(CHUNK),) * (2 + static.forget))
            d_gates_s[D_BETA] = -(read_rows(r_s) * sums[0])
            d_gates_s[D_STEP] = sums[1] * read_rows(feedback_s)
            if static.forget:
                d_gates_s[D_LOG_FORGET] = sums[2] * read_rows(gates_s.at[FORGET])
            plgpu.commit_smem()
            for piece in range(pieces):
                plgpu.copy_smem_to_gmem(k_s.at[piece], d_k_ref.at[b, rows, p, parts.channels(piece)])

        def token_by_token() -> None:
            def block(first: Any) -> list[Any]:
                block = pl.ds(n * CHUNK + first, BLOCK)
                return [ref.at[b, block, p] for ref in (k_ref, *d_ref, cotangent_ref)]

            def step(t: Any, token: list[Any], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                gate = lambda row: gates_s[row, t]
                k, d, cotangent = (tokens.load_row(ref) for ref in token)
                used = cotangent * k if static.multiply else cotangent
                pulled = tokens.pull(carry[0], used, d, k * k, gate, anchor_s, static)
                r = gate(STEP) * pulled.coefficient
                d_u = (gate(STEP) * pulled.feedback) * pulled.after - (gate(BETA) * r) * d
                d_k = 2.0 * (k * d_u)
                if static.multiply:
                    d_k = d_k + cotangent * d
                d_k_ref[b, n * CHUNK + t, p] = d_k.astype(k_ref.dtype)
                d_gates_s[D_STEP, t] = pulled.coefficient * pulled.feedback
                d_gates_s[D_BETA, t] = -(r * pulled.predicted)
                if static.anchored:
                    d = d - tokens.load_row(anchor_s)
                    d_anchor_s[...] = tokens.load_row(d_anchor_s) + gate(DRAW) * pulled.after
                if static.forget:
                    d_gates_s[D_LOG_FORGET, t] = gate(FORGET) * jnp.sum(pulled.after * d)
                return (tokens.stopped(gate(RESTART), pulled.before)[0] if static.documents else pulled.before,)

            tokens.reversed_tokens(block, blocks, block_loaded, step, (tokens.load_row(after_s),))

        for ref, target in [(gates_ref.at[b, p, n], gates_s), (after_ref.at[b, p, n], after_s)]:
            plgpu.copy_gmem_to_smem(ref, target, ready)
        plgpu.copy_gmem_to_smem(anchor_ref.at[b, p], anchor_s, ready)
        if not static.forget:
            d_gates_s[D_LOG_FORGET] = tokens.no_row(CHUNK)
        if static.anchored:
            d_anchor_s[...] = tokens.no_row(size)
        plgpu.barrier_wait(ready)
        if static.exact:
            again = redone_ref[b, p, n] > 0
            pl.when(again)(token_by_token)
            pl.when(jnp.logical_not(again))(closed_form)
        else:
            closed_form()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_gates_s, d_gates_ref.at[b, p, n])
        if static.anchored:
            plgpu.copy_smem_to_gmem(d_anchor_s, d_anchor_ref[0].at[b, p, n])
        plgpu.wait_smem_to_gmem(0)

    row, per_token = plgpu.SMEM((size,), jnp.float32), plgpu.SMEM((CHUNK,), jnp.float32)
    of_a_chunk = [smem(pieces, CHUNK, PIECE, dtype=dtype) for dtype in (k.dtype, cotangent.dtype)]
    of_a_chunk += [parts.again_tile(), row, per_token, per_token, *[parts.halves(1)] * 3]
    blocks = tokens.blocks(size, k.dtype, cotangent.dtype)
    scratch = [
        plgpu.RefUnion(of_a_chunk, blocks) if static.exact else of_a_chunk,  # a chunk needs the one or the others
        plgpu.SMEM((GATES, CHUNK), jnp.float32),
        row,
        row,
        plgpu.SMEM((3, CHUNK), jnp.float32),
        row,
        plgpu.Barrier(num_arrivals=3),
        plgpu.Barrier(num_arrivals=2 * pieces + 4),
        plgpu.Barrier(num_arrivals=3),
    ]
    grid = {"batch": batch, "chunk": count, "head": heads}
    run = (body, "hypergradient_finish", out, grid, scratch, static.interpret, inputs)
    return list(launch_flat(*run, automatic_barriers=True))
