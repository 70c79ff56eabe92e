"""The gradients of what a chunk reads, from the cotangent of the state after it. Parallel over all chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hypergradient_parts as parts
from pallas_kernels.hypergradient_parts import BETA, BLOCK, DRAW, FORGET, GATES, PIECE, RESTART, STEP, TO_END, Static
from pallas_kernels.tiles import (
    CHUNK,
    along_columns,
    column_scale,
    launch,
    products,
    read,
    read_rows,
    row_scale,
    smem,
    split,
    split_terms,
    zeros,
)

# Rows of the gradients of the gates of a chunk.
D_STEP, D_BETA, D_LOG_FORGET = range(3)


def finish(
    k: jax.Array,
    gates: jax.Array,
    redone: jax.Array,
    d: jax.Array,
    used: jax.Array,
    r: jax.Array,
    after: jax.Array,
    anchor: jax.Array,
    static: Static,
) -> list[jax.Array]:
    """Cotangents of k, of step, beta and log_forget [B, P, N, 3, 64], and if anchored of anchor [B, P, N, K].

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        redone: [B, P, N], of `walk`.
        d: [B, T, P, K] float32, of `walk`.
        used: the cotangents of d.
        r, after: of `walk_back`.
        anchor: [B, P, K].
        static: the options.
    """
    batch, length, heads, size = k.shape
    count, pieces = length // CHUNK, size // PIECE
    inputs = [k, gates, redone, d, used, r, after, anchor]
    lead = (batch, heads, count)
    out = [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct((*lead, 3, CHUNK), jnp.float32)]
    out += [jax.ShapeDtypeStruct((*lead, size), jnp.float32)] * static.anchored

    def body(*refs: Any) -> None:
        k_ref, gates_ref, redone_ref, d_ref, used_ref, r_ref, after_ref, anchor_ref, *rest = refs
        d_k_ref, d_gates_ref, d_anchor_ref, *rest = rest if static.anchored else (*rest[:2], None, *rest[2:])
        k_s, d_s, union, gates_s, again_s, r_s, after_s, anchor_s, d_gates_s, d_anchor_s, *rest = rest
        used_s, blocks = union
        loaded, used_loaded, block_loaded, *rest = rest
        left, g = (parts.at(pair, 0) for pair in rest)
        b, p, n = (lax.axis_index(name) for name in ("batch", "head", "chunk"))
        rows = pl.ds(n * CHUNK, CHUNK)

        def load_used(piece: Any) -> None:
            plgpu.copy_gmem_to_smem(used_ref.at[b, rows, p, parts.channels(piece)], used_s, used_loaded)

        def closed_form() -> None:
            for piece in range(pieces):
                part = parts.channels(piece)
                for ref, target in [(k_ref, k_s), (d_ref, d_s)]:
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, p, part], target.at[piece], loaded)
            load_used(0)
            plgpu.copy_gmem_to_smem(r_ref.at[b, p, n], r_s, loaded)
            plgpu.copy_gmem_to_smem(parts.sums_of(gates_ref.at[b, p, n]), again_s, loaded)
            plgpu.barrier_wait(loaded)
            split(parts.left_after(gates_s, again_s, static), *left)

            def predict(piece: Any, predicted: jax.Array) -> jax.Array:
                return predicted + parts.squares(k_s.at[piece]) * read(d_s.at[piece])

            predicted = jnp.sum(parts.over(pieces, predict, zeros(CHUNK, PIECE)), axis=1)
            r, beta = read_rows(r_s), read_rows(gates_s.at[BETA])
            feedback = 1.0 - beta * predicted
            d_gates_s[D_BETA] = -(r * predicted)
            coefficient, taken = read_rows(gates_s.at[STEP]) * feedback, beta * r

            def step(piece: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                part = parts.channels(piece)
                squares = parts.squares(k_s.at[piece])
                plgpu.barrier_wait(used_loaded)
                split(read(used_s) - along_columns(taken, squares) * squares, *g)
                plgpu.commit_smem()
                pl.when(piece + 1 < pieces)(lambda: load_used(piece + 1))
                added = products(split_terms(left, g, short=not static.forget))[0]
                after = column_scale(after_s.at[part], added)
                if static.forget:
                    after = after * row_scale(gates_s.at[TO_END], after)
                after = after + added
                # Read only now, and k again: over the product they would take too many registers.
                k, d = read(k_s.at[piece]), read(d_s.at[piece])
                d_u = along_columns(coefficient, d) * after - along_columns(taken, d) * d
                k_s[piece] = (2.0 * (k * d_u)).astype(k_ref.dtype)
                carry = (carry[0] + after * (k * k), *carry[1:])
                if static.anchored:
                    d = d - column_scale(anchor_s.at[part], d)
                    d_anchor_s[part] = jnp.sum(after * row_scale(gates_s.at[DRAW], after), axis=0)
                return (carry[0], carry[1] + after * d) if static.forget else carry

            sums = parts.over(pieces, step, (zeros(CHUNK, PIECE),) * (1 + static.forget))
            d_gates_s[D_STEP] = jnp.sum(sums[0], axis=1) * feedback
            if static.forget:
                d_gates_s[D_LOG_FORGET] = jnp.sum(sums[1], axis=1) * read_rows(gates_s.at[FORGET])
            plgpu.commit_smem()
            for piece in range(pieces):
                plgpu.copy_smem_to_gmem(k_s.at[piece], d_k_ref.at[b, rows, p, parts.channels(piece)])

        def token_by_token() -> None:
            def block(first: Any) -> list[Any]:
                block = pl.ds(n * CHUNK + first, BLOCK)
                return [ref.at[b, block, p] for ref in (k_ref, d_ref, used_ref)]

            def step(t: Any, token: list[Any], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                gate = lambda row: gates_s[row, t]
                k, d, used = (parts.load_row(ref) for ref in token)
                pulled = parts.pull(carry[0], used, d, k * k, gate, anchor_s, static)
                r = gate(STEP) * pulled.coefficient
                d_u = (gate(STEP) * pulled.feedback) * pulled.after - (gate(BETA) * r) * d
                d_k_ref[b, n * CHUNK + t, p] = (2.0 * (k * d_u)).astype(k_ref.dtype)
                d_gates_s[D_STEP, t] = pulled.coefficient * pulled.feedback
                d_gates_s[D_BETA, t] = -(r * pulled.predicted)
                if static.anchored:
                    d = d - parts.load_row(anchor_s)
                    d_anchor_s[...] = parts.load_row(d_anchor_s) + gate(DRAW) * pulled.after
                if static.forget:
                    d_gates_s[D_LOG_FORGET, t] = gate(FORGET) * jnp.sum(pulled.after * d)
                return (parts.stopped(gate(RESTART), pulled.before)[0] if static.documents else pulled.before,)

            parts.reversed_tokens(block, blocks, block_loaded, step, (parts.load_row(after_s),))

        ready = block_loaded
        for ref, target in [(gates_ref.at[b, p, n], gates_s), (after_ref.at[b, p, n], after_s)]:
            plgpu.copy_gmem_to_smem(ref, target, ready)
        plgpu.copy_gmem_to_smem(anchor_ref.at[b, p], anchor_s, ready)
        if not static.forget:
            d_gates_s[D_LOG_FORGET] = parts.no_row(CHUNK)
        if static.anchored:
            d_anchor_s[...] = parts.no_row(size)
        again = redone_ref[b, p, n] > 0
        plgpu.barrier_wait(ready)
        if static.exact:
            pl.when(again)(token_by_token)
            pl.when(jnp.logical_not(again))(closed_form)
        else:
            closed_form()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(d_gates_s, d_gates_ref.at[b, p, n])
        if static.anchored:
            plgpu.copy_smem_to_gmem(d_anchor_s, d_anchor_ref.at[b, p, n])
        plgpu.wait_smem_to_gmem(0)

    row = plgpu.SMEM((size,), jnp.float32)
    blocks = [plgpu.SMEM((BLOCK, size), dtype) for dtype in (k.dtype, jnp.float32, jnp.float32)]
    scratch = [
        *[smem(pieces, CHUNK, PIECE, dtype=dtype) for dtype in (k.dtype, jnp.float32)],
        plgpu.RefUnion(smem(CHUNK, PIECE, dtype=jnp.float32), blocks),  # a chunk needs the one or the others
        plgpu.SMEM((GATES, CHUNK), jnp.float32),
        parts.again_tile(),
        plgpu.SMEM((CHUNK,), jnp.float32),
        row,
        row,
        plgpu.SMEM((3, CHUNK), jnp.float32),
        row,
        plgpu.Barrier(num_arrivals=2 * pieces + 2),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=3),
        *[parts.halves(1)] * 2,
    ]
    grid = {"chunk": count, "head": heads, "batch": batch}
    return list(launch(body, "hypergradient_finish", out, grid, scratch, static.interpret, inputs))
