"""The gradient of the hypergradient preconditioner, from chunk to chunk: the cotangent of its state, last chunk first.

With g the cotangents of d and l that of the state after a chunk that was not done token by token,

    (I + L)^T r = step (adds + to_end <l, u>)       adds_i = sum_{j > i} E_ji <u_i, g_j>, from `prepare`
    l before the chunk = lead_C l + sum_j lead_j (g_j - beta_j r_j u_j)

and r is the cotangent of the feedback. What follows from r and l within a chunk is done by `finish`, in parallel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hypergradient_parts as parts
from pallas_kernels.hypergradient_parts import BETA, BLOCK, FORGET, GATES, LEAD, PIECE, RESTART, STEP, TO_END, Static
from pallas_kernels.tiles import (
    CHUNK,
    along_columns,
    column_scale,
    launch,
    read_columns,
    read_rows,
    smem,
    zeros,
)


def walk_back(
    k: jax.Array,
    gates: jax.Array,
    prepared: list[jax.Array],
    redone: jax.Array,
    d: jax.Array,
    used: jax.Array,
    final: jax.Array,
    anchor: jax.Array,
    static: Static,
) -> list[jax.Array]:
    """r [B, P, N, 64], l after every chunk [B, P, N, K], the cotangents of initial and restart [B, P, K].

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        prepared: of `prepare`, with cotangents.
        redone: [B, P, N], of `walk`.
        d: [B, T, P, K] float32, of `walk`.
        used: the cotangents of d.
        final: that of the final state [B, P, K].
        anchor: [B, P, K].
        static: the options.
    """
    batch, length, heads, size = k.shape
    count, pieces = length // CHUNK, size // PIECE
    inputs = [k, gates, *prepared, redone, d, used, final, anchor]
    shapes = [(batch, heads, count, CHUNK), (batch, heads, count, size), final.shape, final.shape]
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def body(*refs: Any) -> None:
        k_ref, gates_ref, inverse_ref, adds_ref, state_adds_ref, redone_ref, d_ref, used_ref, *rest = refs
        final_ref, anchor_ref, r_ref, after_ref, initial_ref, restart_ref, *rest = rest
        state_s, restart_s, anchor_s, tokens_s, block_s, d_block_s, used_block_s, *rest = rest
        k_s, gates_s, inverse_s, adds_s, state_adds_s, ready, loaded, block_loaded = rest
        b, p = (lax.axis_index(name) for name in ("batch", "head"))

        def load(n: Any, slot: Any) -> None:
            for piece in range(pieces):
                source = k_ref.at[b, pl.ds(n * CHUNK, CHUNK), p, parts.channels(piece)]
                plgpu.copy_gmem_to_smem(source, k_s.at[slot, piece], loaded.at[slot])
            for ref, target in [
                (gates_ref, gates_s),
                (inverse_ref, inverse_s),
                (adds_ref, adds_s),
                (state_adds_ref, state_adds_s),
            ]:
                plgpu.copy_gmem_to_smem(ref.at[b, p, n], target.at[slot], loaded.at[slot])

        def closed_form(n: Any, slot: Any) -> None:
            def recall(piece: Any, recalled: jax.Array) -> jax.Array:
                squares = parts.squares(k_s.at[slot, piece])
                return recalled + squares * column_scale(state_s.at[parts.channels(piece)], squares)

            recalled = jnp.sum(parts.over(pieces, recall, zeros(CHUNK, PIECE)), axis=1)
            if static.forget:
                recalled = recalled * read_rows(gates_s.at[slot, TO_END])
            right = (recalled + read_rows(adds_s.at[slot])) * read_rows(gates_s.at[slot, STEP])
            inverse = plgpu.load(inverse_s.at[slot], layout=plgpu.Layout.WGMMA)
            tokens_s[...] = jnp.sum(inverse * along_columns(right, inverse), axis=0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tokens_s, r_ref.at[b, p, n])
            taken = read_rows(tokens_s) * read_rows(gates_s.at[slot, BETA])
            if static.forget:
                taken = taken * read_rows(gates_s.at[slot, LEAD])
            lead = gates_s[slot, LEAD, CHUNK - 1] * gates_s[slot, FORGET, CHUNK - 1]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def carry_back(piece: Any, _: Any) -> None:
                part = parts.channels(piece)
                squares = parts.squares(k_s.at[slot, piece])
                state = read_columns(state_s.at[part])
                if static.forget:
                    state = state * lead
                state = state + read_columns(state_adds_s.at[slot, part])
                state_s[part] = state - jnp.sum(squares * along_columns(taken, squares), axis=0)

            parts.over(pieces, carry_back, None)

        def token_by_token(n: Any, slot: Any) -> None:
            def rows(first: Any) -> list[Any]:
                block = pl.ds(n * CHUNK + first, BLOCK)
                return [ref.at[b, block, p] for ref in (k_ref, d_ref, used_ref)]

            def step(t: Any, token: list[Any], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                gate = lambda row: gates_s[slot, row, t]
                u, d, used = parts.square_row(token[0]), parts.load_row(token[1]), parts.load_row(token[2])
                state = parts.pull(carry[0], used, d, u, gate, anchor_s, static).before
                if not static.documents:
                    return (state,)
                before, start = parts.stopped(gate(RESTART), state)
                return before, carry[1] + start

            blocks = [block_s, d_block_s, used_block_s]
            start = [state_s, restart_s] if static.documents else [state_s]
            ends = parts.reversed_tokens(rows, blocks, block_loaded, step, tuple(map(parts.load_row, start)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for target, end in zip(start, ends, strict=True):
                target[...] = end

        def chunk(reverse: Any, _: Any) -> None:
            n, slot = count - 1 - reverse, lax.rem(reverse, jnp.int32(2))
            pl.when(n > 0)(lambda: load(n - 1, 1 - slot))
            plgpu.copy_smem_to_gmem(state_s, after_ref.at[b, p, n])
            again = redone_ref[b, p, n] > 0
            plgpu.barrier_wait(loaded.at[slot])
            if static.exact:
                pl.when(again)(lambda: token_by_token(n, slot))
                pl.when(jnp.logical_not(again))(lambda: closed_form(n, slot))
            else:
                closed_form(n, slot)
            if static.documents:

                @pl.when(gates_s[slot, RESTART, 0] > 0.0)
                def _start() -> None:
                    restart_s[...] = parts.load_row(restart_s) + parts.load_row(state_s)
                    state_s[...] = parts.no_row(size)

            plgpu.commit_smem()

        restart_s[...] = parts.no_row(size)
        plgpu.copy_gmem_to_smem(final_ref.at[b, p], state_s, ready)
        plgpu.copy_gmem_to_smem(anchor_ref.at[b, p], anchor_s, ready)
        load(count - 1, 0)
        plgpu.barrier_wait(ready)
        lax.fori_loop(0, count, chunk, None)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s, initial_ref.at[b, p])
        plgpu.copy_smem_to_gmem(restart_s, restart_ref.at[b, p])
        plgpu.wait_smem_to_gmem(0)

    row = plgpu.SMEM((size,), jnp.float32)
    scratch = [
        *[row] * 3,
        plgpu.SMEM((CHUNK,), jnp.float32),
        *[plgpu.SMEM((BLOCK, size), dtype) for dtype in (k.dtype, jnp.float32, jnp.float32)],
        smem(2, pieces, CHUNK, PIECE, dtype=k.dtype),
        plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
        smem(2, CHUNK, CHUNK, dtype=jnp.float32),
        plgpu.SMEM((2, CHUNK), jnp.float32),
        plgpu.SMEM((2, size), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=pieces + 4, num_barriers=2),
        plgpu.Barrier(num_arrivals=3),
    ]
    grid = {"head": heads, "batch": batch}
    return list(launch(body, "hypergradient_walk_back", out, grid, scratch, static.interpret, inputs))
