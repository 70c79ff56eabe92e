"""The gradient of the hypergradient preconditioner, from chunk to chunk: the cotangent of its state, last chunk first.

With g the cotangents of d and l that of the state after a chunk that was not done token by token,

    (I + L)^T r = step (adds + to_end <l, u>)       adds_i = sum_{j > i} E_ji <u_i, g_j>, from `prepare`
    l before the chunk = lead_C l + sum_j lead_j (g_j - beta_j r_j u_j)

and r is the cotangent of the feedback. What follows from r and l within a chunk is done by `gradients`, in parallel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import launch_flat
from pallas_kernels.common.tiles import CHUNK, column_scale, read_rows, smem, zero_rows
from pallas_kernels.hypergradient import chunk as parts
from pallas_kernels.hypergradient import tokens
from pallas_kernels.hypergradient.chunk import BETA, BLOCK, FORGET, GATES, LEAD, RESTART, STEP, TO_END, WIDTH, Static


def scan_backward(
    k: jax.Array,
    gates: jax.Array,
    prepared: list[jax.Array],
    redone: jax.Array,
    d: jax.Array | None,
    cotangent: jax.Array,
    final: jax.Array,
    anchor: jax.Array,
    static: Static,
) -> list[jax.Array]:
    """r [B, P, N, 64], l after every chunk [B, P, N, K], the cotangents of initial and restart [B, P, K].

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        prepared: of `prepare`, with cotangents.
        redone: [B, P, N], of `scan`.
        d: [B, T, P, K] float32, of `expand`; read where a chunk goes token by token. None where none does.
        cotangent: of d, or with `static.multiply` of d k.
        final: that of the final state [B, P, K].
        anchor: [B, P, K].
        static: the options.
    """
    batch, length, heads, size = k.shape
    count, width = length // CHUNK, min(size, WIDTH)
    steps = size // width
    inputs = [k, gates, *prepared, redone, final, anchor]
    if d is not None:
        inputs += [d, cotangent]
    shapes = [(batch, heads, count, CHUNK), (batch, heads, count, size), final.shape, final.shape]
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def body(at: Any, *refs: Any) -> None:
        ins, (r_ref, after_ref, initial_ref, restart_ref, *rest) = refs[: len(inputs)], refs[len(inputs) :]
        k_ref, gates_ref, inverse_ref, adds_ref, state_adds_ref, redone_ref, final_ref, anchor_ref, *token_refs = ins
        k_s, gates_s, inverse_s, adds_s, state_adds_s, state_s, r_s, tokens_s, restart_s, anchor_s, *rest = rest
        ready, loaded, token_scratch = rest
        b, p = at("batch", "head")

        def here(step: Any) -> Any:
            return pl.ds(step * width, width)

        def load(n: Any, slot: Any) -> None:
            for step in range(steps):
                source = k_ref.at[b, pl.ds(n * CHUNK, CHUNK), p, here(step)]
                plgpu.copy_gmem_to_smem(source, k_s.at[slot, step], loaded.at[slot])
            for ref, target in [
                (gates_ref, gates_s),
                (inverse_ref, inverse_s),
                (adds_ref, adds_s),
                (state_adds_ref, state_adds_s),
            ]:
                plgpu.copy_gmem_to_smem(ref.at[b, p, n], target.at[slot], loaded.at[slot])

        def closed_form(slot: Any) -> None:
            gates = gates_s.at[slot]

            def recall(step: Any, recalled: jax.Array) -> jax.Array:
                squares = parts.squares(k_s.at[slot, step])
                return recalled + jnp.sum(squares * column_scale(state_s.at[slot, here(step)], squares), axis=1)

            recalled = parts.over(steps, recall, zero_rows(CHUNK))
            if static.forget:
                recalled = recalled * read_rows(gates.at[TO_END])
            tokens_s[...] = (recalled + read_rows(adds_s.at[slot])) * read_rows(gates.at[STEP])
            r_s[slot] = parts.over_tokens(parts.transposed(inverse_s.at[slot]), parts.by_token(tokens_s))
            taken = parts.by_token(r_s.at[slot]) * parts.by_token(gates.at[BETA])
            if static.forget:
                taken = taken * parts.by_token(gates.at[LEAD])
            lead = gates_s[slot, LEAD, CHUNK - 1] * gates_s[slot, FORGET, CHUNK - 1]

            def carry_back(step: Any, _: Any) -> None:
                state = parts.by_channel(state_s.at[slot, here(step)])
                if static.forget:
                    state = state * lead
                state = state + parts.by_channel(state_adds_s.at[slot, here(step)])
                state_s[1 - slot, here(step)] = state - parts.over_tokens(
                    parts.squares_by_channel(k_s.at[slot, step]), taken
                )

            parts.over(steps, carry_back, None)

        def token_by_token(n: Any, slot: Any) -> None:
            *blocks, block_loaded = token_scratch

            def rows(first: Any) -> list[Any]:
                return [ref.at[b, pl.ds(n * CHUNK + first, BLOCK), p] for ref in (k_ref, *token_refs)]

            def step(t: Any, token: list[Any], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                gate = lambda row: gates_s[slot, row, t]
                key, d, used = (tokens.load_row(ref) for ref in token)
                if static.multiply:
                    used = used * key
                state = tokens.pull(carry[0], used, d, key * key, gate, anchor_s, static).before
                if not static.documents:
                    return (state,)
                before, start = tokens.stopped(gate(RESTART), state)
                return before, carry[1] + start

            state = tokens.load_row(state_s.at[slot])
            start = (state, tokens.load_row(restart_s)) if static.documents else (state,)
            ends = tokens.reversed_tokens(rows, blocks, block_loaded, step, start)
            state_s[1 - slot] = ends[0]
            if static.documents:
                restart_s[...] = ends[1]

        def chunk(reverse: Any, _: Any) -> None:
            n, slot = count - 1 - reverse, lax.rem(reverse, jnp.int32(2))
            pl.when(n > 0)(lambda: load(n - 1, 1 - slot))
            plgpu.copy_smem_to_gmem(state_s.at[slot], after_ref.at[b, p, n])
            plgpu.barrier_wait(loaded.at[slot])
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # of what is written now: two chunks ago, and one
            if static.exact:
                again = redone_ref[b, p, n] > 0
                pl.when(again)(lambda: token_by_token(n, slot))
                pl.when(jnp.logical_not(again))(lambda: closed_form(slot))
            else:
                closed_form(slot)
            if static.documents:

                @pl.when(gates_s[slot, RESTART, 0] > 0.0)
                def _start() -> None:
                    restart_s[...] = tokens.load_row(restart_s) + tokens.load_row(state_s.at[1 - slot])
                    state_s[1 - slot] = tokens.no_row(size)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(r_s.at[slot], r_ref.at[b, p, n])  # nobody reads it where it was not made

        restart_s[...] = tokens.no_row(size)
        plgpu.copy_gmem_to_smem(final_ref.at[b, p], state_s.at[0], ready)
        plgpu.copy_gmem_to_smem(anchor_ref.at[b, p], anchor_s, ready)
        load(count - 1, 0)
        plgpu.barrier_wait(ready)
        lax.fori_loop(0, count, chunk, None)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(state_s.at[count % 2], initial_ref.at[b, p])
        plgpu.copy_smem_to_gmem(restart_s, restart_ref.at[b, p])
        plgpu.wait_smem_to_gmem(0)

    row = plgpu.SMEM((size,), jnp.float32)
    scratch = [
        smem(2, steps, CHUNK, width, dtype=k.dtype),
        plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
        smem(2, CHUNK, CHUNK, dtype=jnp.float32),
        plgpu.SMEM((2, CHUNK), jnp.float32),
        plgpu.SMEM((2, size), jnp.float32),
        plgpu.SMEM((2, size), jnp.float32),
        plgpu.SMEM((2, CHUNK), jnp.float32),
        plgpu.SMEM((CHUNK,), jnp.float32),
        row,
        row,
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=steps + 4, num_barriers=2),
        [*tokens.blocks(size, k.dtype, cotangent.dtype), plgpu.Barrier(num_arrivals=3)] if static.exact else [],
    ]
    grid = {"batch": batch, "head": heads}
    run = (body, "hypergradient_walk_back", out, grid, scratch, static.interpret, inputs)
    return list(launch_flat(*run, automatic_barriers=True))
