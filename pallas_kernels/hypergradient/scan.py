"""The hypergradient preconditioner from chunk to chunk: one block per batch and head keeps its state.

The chain from one chunk to the next is what takes time, so it holds no more than the next chunk needs: the feedback of
every token and the state after the last, three products with a vector. `expand` does the rest, chunk-parallel.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import launch_flat
from pallas_kernels.common.tiles import CHUNK, column_scale, indices, read_rows, smem, zero_rows
from pallas_kernels.hypergradient import chunk as parts
from pallas_kernels.hypergradient import tokens
from pallas_kernels.hypergradient.chunk import (
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

# Relative errors far above those of `expand`: in a sum of terms of one sign, and in what is left of the start.
_ROUNDING, _LEFT = 2.0**-12, 2.0**-18


def scan(
    k: jax.Array,
    gates: jax.Array,
    inverse: jax.Array,
    initial: jax.Array,
    restart: jax.Array,
    anchor: jax.Array,
    static: Static,
) -> list[jax.Array]:
    """The state before each chunk, the feedback of each token, the final state, and which chunks go token by token.

    They are [B, P, N, K], [B, P, N, 64] and [B, P, K] float32, and [B, P, N] int32, all zeros where `static.exact` is
    False. The feedback of a chunk that goes token by token means nothing.

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        inverse: of `prepare`.
        initial, restart, anchor: [B, P, K] float32.
        static: the options.
    """
    batch, length, heads, size = k.shape
    count, width = length // CHUNK, min(size, parts.WIDTH)
    steps = size // width
    lead = (batch, heads, count)
    shapes = [(*lead, size), (*lead, CHUNK), initial.shape]
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes] + [jax.ShapeDtypeStruct(lead, jnp.int32)]

    def body(at: Any, *refs: Any) -> None:
        k_ref, gates_ref, inverse_ref, initial_ref, restart_ref, anchor_ref, *rest = refs
        starts_ref, feedback_ref, final_ref, redone_ref, *rest = rest
        k_s, gates_s, inverse_s, state_s, feedback_s, tokens_s, restart_s, anchor_s, ready, loaded, *rest = rest
        token_scratch, test_scratch = rest
        b, p = at("batch", "head")

        def here(step: Any) -> Any:
            return pl.ds(step * width, width)

        def load(n: Any, slot: Any) -> None:
            for step in range(steps):
                source = k_ref.at[b, pl.ds(n * CHUNK, CHUNK), p, here(step)]
                plgpu.copy_gmem_to_smem(source, k_s.at[slot, step], loaded.at[slot])
            plgpu.copy_gmem_to_smem(gates_ref.at[b, p, n], gates_s.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(inverse_ref.at[b, p, n], inverse_s.at[slot], loaded.at[slot])

        def solve(slot: Any) -> jax.Array:
            """The feedback of every token."""
            gates = gates_s.at[slot]

            def recall(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                squares = parts.squares(k_s.at[slot, step])
                start = column_scale(state_s.at[slot, here(step)], squares)
                if not static.anchored:
                    return (sums[0] + jnp.sum(squares * start, axis=1),)
                drawn = column_scale(anchor_s.at[here(step)], squares)
                start = start - drawn
                return sums[0] + jnp.sum(squares * start, axis=1), sums[1] + jnp.sum(squares * drawn, axis=1)

            recalled, *drawn = parts.over(steps, recall, (zero_rows(CHUNK),) * (1 + static.anchored))
            if static.forget:
                recalled = recalled * read_rows(gates.at[LEAD])
            if static.anchored:
                recalled = recalled + drawn[0]
            tokens_s[...] = 1.0 - read_rows(gates.at[BETA]) * recalled
            solved = plgpu.load(inverse_s.at[slot], layout=plgpu.Layout.WGMMA)
            return jnp.sum(solved * column_scale(tokens_s, solved), axis=1)

        def advance(slot: Any) -> Any:
            """Takes the state past the chunk; above 0 where a value inside of it might leave the bounds.

            What a token adds never grows afterwards. So no value lies below the lesser of the start and what is left of
            it at the end, and all that is added with a negative sign; nor above the greater, and all of positive sign.
            """
            gates = gates_s.at[slot]
            lead = gates_s[slot, LEAD, CHUNK - 1] * gates_s[slot, FORGET, CHUNK - 1]
            coefficient = parts.by_token(feedback_s.at[slot]) * parts.by_token(gates.at[STEP])
            to_end = coefficient * parts.by_token(gates.at[TO_END]) if static.forget else coefficient

            def add(step: Any, leaving: jax.Array) -> jax.Array:
                squares = parts.squares_by_channel(k_s.at[slot, step])
                start = parts.by_channel(state_s.at[slot, here(step)])
                left = start * lead if static.forget else start
                if static.anchored:
                    drawn = parts.by_channel(anchor_s.at[here(step)])
                    left = drawn + lead * (start - drawn)
                if static.bounds is None:
                    state_s[1 - slot, here(step)] = left + parts.over_tokens(squares, to_end)
                    return leaving
                up = parts.over_tokens(squares, jnp.maximum(coefficient, 0.0))
                down = parts.over_tokens(squares, jnp.minimum(coefficient, 0.0))
                added = parts.over_tokens(squares, to_end) if static.forget else up + down
                state_s[1 - slot, here(step)] = left + added
                least, most = jnp.minimum(start, left), jnp.maximum(start, left)
                if static.anchored:
                    rounded = (jnp.abs(start) + jnp.abs(drawn)) * _LEFT
                    least, most = least - rounded, most + rounded
                elif static.forget:  # keeps its sign, and so zero as a bound, however little is left
                    least, most = least - jnp.abs(least) * _LEFT, most + jnp.abs(most) * _LEFT
                least, most = least + down * (1.0 + _ROUNDING), most + up * (1.0 + _ROUNDING)
                infinite = jnp.where(up - down < jnp.inf, 0.0, 1.0)
                return leaving + tokens.outside(least, static) + tokens.outside(most, static) + infinite

            leaving = parts.over(steps, add, parts.no_channels(width))
            return 0.0 if static.bounds is None else jnp.sum(leaving)

        def test(n: Any, slot: Any) -> Any:
            """How many values of the chunk leave the bounds, of those that `expand` would write."""
            again_s, u, weights, again_loaded = test_scratch
            u, weights = parts.at(u, 0), parts.at(weights, 0)
            plgpu.copy_gmem_to_smem(parts.sums_of(gates_ref.at[b, p, n]), again_s, again_loaded)
            plgpu.barrier_wait(again_loaded)
            parts.weigh(feedback_s.at[slot], gates_s.at[slot], again_s, weights, static)
            first = indices((CHUNK, PIECE))[0] == 0

            def count_leaving(step: Any, leaving: jax.Array) -> jax.Array:
                for begin in range(0, width, PIECE):
                    channels = pl.ds(step * width + begin, PIECE)
                    keys = k_s.at[slot, step, :, pl.ds(begin, PIECE)]
                    states = state_s.at[slot, channels], anchor_s.at[channels]
                    values = parts.closed_form(keys, *states, gates_s.at[slot], u, weights, static)
                    leaving = leaving + jnp.sum(jnp.where(first, 0.0, tokens.outside(values, static)), axis=1)
                return leaving

            tokens_s[...] = parts.over(steps, count_leaving, zero_rows(CHUNK))
            after = tokens.outside(tokens.load_row(state_s.at[1 - slot]), static)
            return jnp.sum(tokens.load_row(tokens_s)) + jnp.sum(after)

        def redo(n: Any, slot: Any) -> None:
            rows = lambda first: k_ref.at[b, pl.ds(n * CHUNK + first, BLOCK), p]
            start, memory = tokens.load_row(state_s.at[slot]), (restart_s, anchor_s, *token_scratch)
            state_s[1 - slot] = tokens.token_by_token(start, rows, gates_s.at[slot], *memory, static=static)

        def chunk(n: Any, _: Any) -> None:
            slot = lax.rem(n, jnp.int32(2))
            pl.when(n + 1 < count)(lambda: load(n + 1, 1 - slot))
            plgpu.barrier_wait(loaded.at[slot])
            if static.documents:

                @pl.when(gates_s[slot, RESTART, 0] > 0.0)
                def _start() -> None:
                    state_s[slot] = tokens.load_row(restart_s)
                    plgpu.commit_smem()

            plgpu.copy_smem_to_gmem(state_s.at[slot], starts_ref.at[b, p, n])
            feedback = solve(slot)
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # of what is written now: two chunks ago, and one
            feedback_s[slot] = feedback
            again = advance(slot)
            if static.exact:
                forced = gates_s[slot, FORCED, 0]
                if static.bounds is not None:
                    again = lax.cond((again > 0.0) & (forced == 0.0), lambda: test(n, slot), lambda: 0.0)
                again = (again + forced) > 0.0
                redone_ref[b, p, n] = again.astype(jnp.int32)
                pl.when(again)(lambda: redo(n, slot))
            else:
                redone_ref[b, p, n] = jnp.int32(0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(feedback_s.at[slot], feedback_ref.at[b, p, n])

        for source, target in [(initial_ref, state_s.at[0]), (restart_ref, restart_s), (anchor_ref, anchor_s)]:
            plgpu.copy_gmem_to_smem(source.at[b, p], target, ready)
        load(0, 0)
        plgpu.barrier_wait(ready)
        lax.fori_loop(0, count, chunk, None)
        plgpu.copy_smem_to_gmem(state_s.at[count % 2], final_ref.at[b, p])
        plgpu.wait_smem_to_gmem(0)

    row = plgpu.SMEM((size,), jnp.float32)
    scratch = [
        smem(2, steps, CHUNK, width, dtype=k.dtype),
        plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
        smem(2, CHUNK, CHUNK, dtype=jnp.float32),
        plgpu.SMEM((2, size), jnp.float32),
        plgpu.SMEM((2, CHUNK), jnp.float32),
        plgpu.SMEM((CHUNK,), jnp.float32),
        row,
        row,
        plgpu.Barrier(num_arrivals=3),
        plgpu.Barrier(num_arrivals=steps + 2, num_barriers=2),
        [plgpu.SMEM((BLOCK, size), k.dtype), plgpu.Barrier()] if static.exact else [],
        [parts.again_tile(), *[parts.halves(1)] * 2, plgpu.Barrier()] if static.bounds is not None else [],
    ]
    grid = {"batch": batch, "head": heads}
    arguments = [k, gates, inverse, initial, restart, anchor]
    run = (body, "hypergradient_walk", out, grid, scratch, static.interpret, arguments)
    return list(launch_flat(*run, automatic_barriers=True))
