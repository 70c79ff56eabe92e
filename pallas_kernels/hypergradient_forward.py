"""The hypergradient preconditioner from chunk to chunk: one block per batch and head keeps its state."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hypergradient_parts as parts
from pallas_kernels.hypergradient_parts import (
    BETA,
    BLOCK,
    FORCED,
    FORGET,
    GATES,
    LEAD,
    PIECE,
    RESTART,
    STEP,
    TO_END,
    Static,
)
from pallas_kernels.tiles import (
    CHUNK,
    along_columns,
    column_scale,
    indices,
    launch,
    products,
    read_columns,
    read_rows,
    row_scale,
    smem,
    split,
    split_terms,
    zero_columns,
    zeros,
)


def walk(
    k: jax.Array,
    gates: jax.Array,
    inverse: jax.Array,
    initial: jax.Array,
    restart: jax.Array,
    anchor: jax.Array,
    static: Static,
) -> list[jax.Array]:
    """d [B, T, P, K], the final state [B, P, K], both float32, and which chunks were done token by token.

    The last is [B, P, N] int32, all zeros where `static.exact` is False.

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        inverse: of `prepare`.
        initial, restart, anchor: [B, P, K] float32.
        static: the options.
    """
    batch, length, heads, size = k.shape
    count, pieces = length // CHUNK, size // PIECE
    stages = 2 if size * k.dtype.itemsize <= 256 else 1
    out = [
        jax.ShapeDtypeStruct(k.shape, jnp.float32),
        jax.ShapeDtypeStruct(initial.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, count), jnp.int32),
    ]

    def body(*refs: Any) -> None:
        k_ref, gates_ref, inverse_ref, initial_ref, restart_ref, anchor_ref, d_ref, final_ref, redone_ref, *rest = refs
        state_s, restart_s, anchor_s, after_s, tokens_s, d_s, block_s, *rest = rest
        k_s, gates_s, again_s, inverse_s, ready, loaded, block_loaded, *rest = rest
        u, weights = rest[0], parts.at(rest[1], 0)
        b, p = (lax.axis_index(name) for name in ("batch", "head"))

        def load(n: Any, slot: Any) -> None:
            for piece in range(pieces):
                source = k_ref.at[b, pl.ds(n * CHUNK, CHUNK), p, parts.channels(piece)]
                plgpu.copy_gmem_to_smem(source, k_s.at[slot, piece], loaded.at[slot])
            plgpu.copy_gmem_to_smem(gates_ref.at[b, p, n], gates_s.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(parts.sums_of(gates_ref.at[b, p, n]), again_s.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(inverse_ref.at[b, p, n], inverse_s.at[slot], loaded.at[slot])

        def coefficients(slot: Any) -> jax.Array:
            """c of every token; the squared keys by halves on the way."""

            def step(piece: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                predicted, *drawn = carry
                squares, part = parts.squares(k_s.at[slot, piece]), parts.channels(piece)
                split(squares, *parts.at(u, piece))
                start = column_scale(state_s.at[part], squares)
                if static.anchored:
                    anchored = column_scale(anchor_s.at[part], squares)
                    start, drawn = start - anchored, [drawn[0] + squares * anchored]
                return (predicted + squares * start, *drawn)

            predicted, *drawn = parts.over(pieces, step, (zeros(CHUNK, PIECE),) * (1 + static.anchored))
            recalled = jnp.sum(predicted, axis=1)
            if static.forget:
                recalled = recalled * read_rows(gates_s.at[slot, LEAD])
            if static.anchored:
                recalled = recalled + jnp.sum(drawn[0], axis=1)
            tokens_s[...] = 1.0 - read_rows(gates_s.at[slot, BETA]) * recalled
            solved = plgpu.load(inverse_s.at[slot], layout=plgpu.Layout.WGMMA)
            solved = solved * column_scale(tokens_s, solved)
            return jnp.sum(solved, axis=1) * read_rows(gates_s.at[slot, STEP])

        def closed_form(slot: Any) -> Any:
            """d before each token into d_s and after the last into after_s; how many values leave the bounds."""
            coefficient = coefficients(slot)
            tokens_s[...] = coefficient
            left = parts.left_before(gates_s.at[slot], again_s.at[slot], static)
            split(left * column_scale(tokens_s, left), *weights)
            to_end = coefficient * read_rows(gates_s.at[slot, TO_END]) if static.forget else coefficient
            lead = gates_s[slot, LEAD, CHUNK - 1] * gates_s[slot, FORGET, CHUNK - 1]
            plgpu.commit_smem()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            first = indices((CHUNK, PIECE))[0] == 0

            def step(piece: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                part = parts.channels(piece)
                values = products(split_terms(weights, parts.at(u, piece)))[0]
                start = column_scale(state_s.at[part], values)
                after = read_columns(state_s.at[part])
                if static.anchored:
                    start = start - column_scale(anchor_s.at[part], values)
                    after = after - read_columns(anchor_s.at[part])
                if static.forget:
                    start, after = start * row_scale(gates_s.at[slot, LEAD], values), after * lead
                added = parts.squares(k_s.at[slot, piece])
                values, after = values + start, after + jnp.sum(added * along_columns(to_end, added), axis=0)
                if static.anchored:
                    values = values + column_scale(anchor_s.at[part], values)
                    after = after + read_columns(anchor_s.at[part])
                d_s[piece] = values
                after_s[part] = after
                if static.bounds is None:
                    return carry
                leaving = jnp.where(first, 0.0, parts.outside(values, static))
                return carry[0] + leaving, carry[1] + parts.outside(after, static)

            leaving, leaving_after = parts.over(pieces, step, (zeros(CHUNK, PIECE), zero_columns(PIECE)))
            if static.bounds is None:
                return 0.0
            tokens_s[...] = jnp.sum(leaving, axis=1)
            return jnp.sum(leaving_after) + jnp.sum(read_columns(tokens_s))

        def accept(n: Any) -> None:
            plgpu.commit_smem()
            for piece in range(pieces):
                target = d_ref.at[b, pl.ds(n * CHUNK, CHUNK), p, parts.channels(piece)]
                plgpu.copy_smem_to_gmem(d_s.at[piece], target)
            state_s[...] = parts.load_row(after_s)

        def redo(n: Any, slot: Any) -> None:
            def block(m: Any, d: jax.Array) -> jax.Array:
                begin = n * CHUNK + m * BLOCK
                plgpu.commit_smem()  # all have read the rows of the block before
                plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(begin, BLOCK), p], block_s, block_loaded)
                plgpu.barrier_wait(block_loaded)

                def token(i: Any, d: jax.Array) -> jax.Array:
                    gate = lambda row: gates_s[slot, row, m * BLOCK + i]
                    if static.documents:
                        d = parts.restarted(gate(RESTART), restart_s, d)
                    d_ref[b, begin + i, p] = d
                    after, _, _ = parts.update(d, parts.square_row(block_s.at[i]), gate, anchor_s, static)
                    return parts.project(after, static)

                return lax.fori_loop(0, BLOCK, token, d)

            state_s[...] = lax.fori_loop(0, CHUNK // BLOCK, block, parts.load_row(state_s))

        def chunk(n: Any, _: Any) -> None:
            slot = lax.rem(n, jnp.int32(stages))
            if stages == 1:
                load(n, slot)
            else:
                pl.when(n + 1 < count)(lambda: load(n + 1, 1 - slot))
            plgpu.barrier_wait(loaded.at[slot])
            if static.documents:

                @pl.when(gates_s[slot, RESTART, 0] > 0.0)
                def _start() -> None:
                    state_s[...] = parts.load_row(restart_s)

            leaving = closed_form(slot)
            if static.exact:
                again = (leaving + gates_s[slot, FORCED, 0]) > 0.0
                redone_ref[b, p, n] = again.astype(jnp.int32)
                pl.when(again)(lambda: redo(n, slot))
                pl.when(jnp.logical_not(again))(lambda: accept(n))
            else:
                redone_ref[b, p, n] = jnp.int32(0)
                accept(n)
            plgpu.commit_smem()

        states = [(initial_ref, state_s), (restart_ref, restart_s), (anchor_ref, anchor_s)]
        for source, target in states:
            plgpu.copy_gmem_to_smem(source.at[b, p], target, ready)
        if stages > 1:
            load(0, 0)
        plgpu.barrier_wait(ready)
        lax.fori_loop(0, count, chunk, None)
        plgpu.copy_smem_to_gmem(state_s, final_ref.at[b, p])
        plgpu.wait_smem_to_gmem(0)

    row, tokens = plgpu.SMEM((size,), jnp.float32), plgpu.SMEM((CHUNK,), jnp.float32)
    scratch = [
        *[row] * 4,
        tokens,
        smem(pieces, CHUNK, PIECE, dtype=jnp.float32),
        plgpu.SMEM((BLOCK, size), k.dtype),
        smem(stages, pieces, CHUNK, PIECE, dtype=k.dtype),
        plgpu.SMEM((stages, GATES, CHUNK), jnp.float32),
        parts.again_tile(stages),
        smem(stages, CHUNK, CHUNK, dtype=jnp.float32),
        plgpu.Barrier(num_arrivals=3),
        plgpu.Barrier(num_arrivals=pieces + 3, num_barriers=stages),
        plgpu.Barrier(),
        parts.halves(pieces),
        parts.halves(1),
    ]
    grid = {"head": heads, "batch": batch}
    arguments = [k, gates, inverse, initial, restart, anchor]
    return list(launch(body, "hypergradient_walk", out, grid, scratch, static.interpret, arguments))
