"""d before every token, or its write key, from the state before each chunk. Parallel over all chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import launch_flat
from pallas_kernels.common.tiles import CHUNK, read, smem
from pallas_kernels.hypergradient import chunk as parts
from pallas_kernels.hypergradient import tokens
from pallas_kernels.hypergradient.chunk import BLOCK, GATES, PIECE, Static


def expand(
    k: jax.Array,
    gates: jax.Array,
    starts: jax.Array,
    feedback: jax.Array,
    redone: jax.Array,
    restart: jax.Array,
    anchor: jax.Array,
    *,
    static: Static,
    multiply: bool,
    redone_only: bool = False,
) -> jax.Array:
    """d before every token [B, T, P, K] float32, or the write keys d k in the type of k.

    A chunk that goes token by token does so here once more, as in `scan`, which then has no rows to write.

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        starts, feedback, redone: of `scan`.
        restart, anchor: [B, P, K] float32.
        static: the options.
        multiply: return the write keys.
        redone_only: leave undefined what does not go token by token.
    """
    batch, length, heads, size = k.shape
    count, pieces = length // CHUNK, size // PIECE
    inputs = [k, gates, starts, feedback, redone, restart, anchor]
    out = jax.ShapeDtypeStruct(k.shape, k.dtype if multiply else jnp.float32)

    def body(at: Any, *refs: Any) -> None:
        k_ref, gates_ref, starts_ref, feedback_ref, redone_ref, restart_ref, anchor_ref, out_ref, *rest = refs
        gates_s, start_s, restart_s, anchor_s, ready, token_scratch, chunk_scratch = rest
        b, p, n = at("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)

        def closed_form() -> None:
            k_s, out_s, again_s, feedback_s, u, weights, loaded = chunk_scratch
            u, weights = parts.at(u, 0), parts.at(weights, 0)
            for piece in range(pieces):
                plgpu.copy_gmem_to_smem(k_ref.at[b, rows, p, parts.channels(piece)], k_s.at[piece], loaded)
            plgpu.copy_gmem_to_smem(parts.sums_of(gates_ref.at[b, p, n]), again_s, loaded)
            plgpu.copy_gmem_to_smem(feedback_ref.at[b, p, n], feedback_s, loaded)
            plgpu.barrier_wait(loaded)
            parts.weigh(feedback_s, gates_s, again_s, weights, static)

            def step(piece: Any, _: Any) -> None:
                part = parts.channels(piece)
                keys, states = k_s.at[piece], (start_s.at[part], anchor_s.at[part])
                values = parts.closed_form(keys, *states, gates_s, u, weights, static)
                if multiply:
                    out = keys  # in the place of the keys
                    out[...] = (values * read(keys)).astype(k_ref.dtype)
                else:
                    out = out_s
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out[...] = values
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, out_ref.at[b, rows, p, part])

            parts.over(pieces, step, None)
            plgpu.wait_smem_to_gmem(0)

        def token_by_token() -> None:
            def write(t: Any, key: jax.Array, d: jax.Array) -> None:
                out_ref[b, n * CHUNK + t, p] = (d * key if multiply else d).astype(out_ref.dtype)

            block = lambda first: k_ref.at[b, pl.ds(n * CHUNK + first, BLOCK), p]
            memory = (restart_s, anchor_s, *token_scratch)
            tokens.token_by_token(tokens.load_row(start_s), block, gates_s, *memory, static=static, write=write)

        def begin(do: Any) -> None:
            plgpu.copy_gmem_to_smem(gates_ref.at[b, p, n], gates_s, ready)
            plgpu.copy_gmem_to_smem(starts_ref.at[b, p, n], start_s, ready)
            for source, target in [(restart_ref, restart_s), (anchor_ref, anchor_s)]:
                plgpu.copy_gmem_to_smem(source.at[b, p], target, ready)
            plgpu.barrier_wait(ready)
            do()

        if not static.exact:
            begin(closed_form)
            return
        again = redone_ref[b, p, n] > 0
        pl.when(again)(lambda: begin(token_by_token))
        if not redone_only:
            pl.when(jnp.logical_not(again))(lambda: begin(closed_form))

    row, per_token = plgpu.SMEM((size,), jnp.float32), plgpu.SMEM((CHUNK,), jnp.float32)
    of_a_chunk = [
        smem(pieces, CHUNK, PIECE, dtype=k.dtype),
        plgpu.SMEM((1,), jnp.float32) if multiply else smem(CHUNK, PIECE, dtype=jnp.float32),
        parts.again_tile(),
        per_token,
        *[parts.halves(1)] * 2,
        plgpu.Barrier(num_arrivals=pieces + 2),
    ]
    scratch = [
        plgpu.SMEM((GATES, CHUNK), jnp.float32),
        *[row] * 3,
        plgpu.Barrier(num_arrivals=4),
        [plgpu.SMEM((BLOCK, size), k.dtype), plgpu.Barrier()] if static.exact else [],
        [] if redone_only else of_a_chunk,  # blocks that need less of the memory leave room for others
    ]
    grid = {"batch": batch, "chunk": count, "head": heads}
    run = (body, "hypergradient_expand", out, grid, scratch, static.interpret, inputs)
    return launch_flat(*run, automatic_barriers=True)
