"""The backward scan over chunks of the hypergradient preconditioner: the cotangent of its state, last chunk first.

With g the cotangents of d and l that of the state after a chunk which is not sequential,

    (I + L)^T r = step (d_coefficient + to_end <l, u>)       d_coefficient and d_start from `prepare`
    l before the chunk = decay_C l + d_start - sum_j decay_j beta_j r_j u_j

where r is the cotangent of the feedback. `gradients` computes the rest from r and l, in parallel over all chunks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import BlockIndex, launch
from pallas_kernels.common.tiles import CHUNK, column_scale, read_rows, smem, zero_rows
from pallas_kernels.hypergradient.chunk import (
    BETA,
    DECAY_BEFORE,
    FORGET,
    GATES,
    RESET,
    SCAN_SLAB,
    STEP,
    TO_END,
    Chunks,
    HypergradientOptions,
    channels,
    fold_slabs,
    read_by_channel,
    read_by_token,
    read_transposed,
    squares,
    squares_transposed,
    sum_over_tokens,
)
from pallas_kernels.hypergradient.prepare import Prepared
from pallas_kernels.hypergradient.tokens import (
    LOADED_TOKENS,
    adjoint_rows,
    load_row,
    scan_tokens_backward,
    split_reset_cotangent,
    token_vjp,
    zero_row,
)


class Cotangents(NamedTuple):
    """Results of `scan_backward`, float32."""

    d_feedback: jax.Array  # r [B, P, N, 64], undefined in sequential chunks
    d_after: jax.Array  # l, of the state after every chunk [B, P, N, K]
    d_initial: jax.Array  # [B, P, K]
    d_after_reset: jax.Array  # [B, P, K]


def scan_backward(
    chunks: Chunks,
    prepared: Prepared,
    d: jax.Array | None,
    d_out: jax.Array,
    d_final: jax.Array,
    options: HypergradientOptions,
) -> Cotangents:
    """Return the cotangents of the feedback and of the states.

    Args:
        chunks: of `scan`.
        prepared: of `prepare`, for `d_out`.
        d: [B, T, P, K] float32, of `expand`; read in sequential chunks. None if there are none.
        d_out: cotangent of d, or with `options.return_write_key` of d k.
        d_final: cotangent of the final state [B, P, K].
        options: of the kernel.
    """
    batch, length, heads, size = chunks.k.shape
    count, width = length // CHUNK, min(size, SCAN_SLAB)
    slabs = size // width

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        b, p = index("batch", "head")

        def load(n: Any, slot: Any) -> None:
            loaded = shared.chunk_loaded.at[slot]
            for slab in range(slabs):
                keys = source.k.at[b, pl.ds(n * CHUNK, CHUNK), p, channels(slab, width)]
                plgpu.copy_gmem_to_smem(keys, shared.k.at[slot, slab], loaded)
            for name in ("gates", "inverse", "d_coefficient", "d_start"):
                plgpu.copy_gmem_to_smem(getattr(source, name).at[b, p, n], getattr(shared, name).at[slot], loaded)

        def run_chunk(slot: Any) -> None:
            gates = shared.gates.at[slot]

            def add(slab: Any, sums: jax.Array) -> jax.Array:
                u = squares(shared.k.at[slot, slab])
                return sums + jnp.sum(u * column_scale(shared.d_state.at[slot, channels(slab, width)], u), axis=1)

            d_coefficient = fold_slabs(slabs, add, zero_rows(CHUNK))
            if options.forget:
                d_coefficient = d_coefficient * read_rows(gates.at[TO_END])
            d_coefficient = d_coefficient + read_rows(shared.d_coefficient.at[slot])
            shared.per_token[...] = d_coefficient * read_rows(gates.at[STEP])
            d_feedback = sum_over_tokens(read_transposed(shared.inverse.at[slot]), read_by_token(shared.per_token))
            shared.d_feedback[slot] = d_feedback
            weights = read_by_token(shared.d_feedback.at[slot]) * read_by_token(gates.at[BETA])
            if options.forget:
                weights = weights * read_by_token(gates.at[DECAY_BEFORE])
            chunk_decay = shared.gates[slot, DECAY_BEFORE, CHUNK - 1] * shared.gates[slot, FORGET, CHUNK - 1]

            def write(slab: Any, _: Any) -> None:
                d_state = read_by_channel(shared.d_state.at[slot, channels(slab, width)])
                if options.forget:
                    d_state = d_state * chunk_decay
                d_state = d_state + read_by_channel(shared.d_start.at[slot, channels(slab, width)])
                shared.d_state[1 - slot, channels(slab, width)] = d_state - sum_over_tokens(
                    squares_transposed(shared.k.at[slot, slab]), weights
                )

            fold_slabs(slabs, write, None)

        def run_sequentially(n: Any, slot: Any) -> None:
            def rows_from(first: Any) -> list[Any]:
                rows = pl.ds(n * CHUNK + first, LOADED_TOKENS)
                return [ref.at[b, rows, p] for ref in (source.k, source.d, source.d_out)]

            def step(t: Any, token: list[Any], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                gate = lambda row: shared.gates[slot, row, t]
                key, d, d_out = (load_row(ref) for ref in token)
                if options.return_write_key:
                    d_out = d_out * key
                d_before = token_vjp(carry[0], d_out, d, key * key, gate, shared.anchor, options).d_before
                if not options.resets:
                    return (d_before,)
                d_before, d_after_reset = split_reset_cotangent(gate(RESET), d_before)
                return d_before, carry[1] + d_after_reset

            d_state = load_row(shared.d_state.at[slot])
            carry = (d_state, load_row(shared.d_after_reset)) if options.resets else (d_state,)
            carry = scan_tokens_backward(rows_from, shared.rows, shared.rows.loaded, step, carry)
            shared.d_state[1 - slot] = carry[0]
            if options.resets:
                shared.d_after_reset[...] = carry[1]

        def chunk(reverse: Any, _: Any) -> None:
            n, slot = count - 1 - reverse, lax.rem(reverse, jnp.int32(2))
            pl.when(n > 0)(lambda: load(n - 1, 1 - slot))
            plgpu.copy_smem_to_gmem(shared.d_state.at[slot], target.d_after.at[b, p, n])
            plgpu.barrier_wait(shared.chunk_loaded.at[slot])
            # Wait for the stores from d_feedback[slot], two chunks ago, and from d_state[1 - slot], one chunk ago.
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)
            if options.may_run_sequentially:
                sequential = source.sequential[b, p, n] > 0
                pl.when(sequential)(lambda: run_sequentially(n, slot))
                pl.when(jnp.logical_not(sequential))(lambda: run_chunk(slot))
            else:
                run_chunk(slot)
            if options.resets:

                @pl.when(shared.gates[slot, RESET, 0] > 0.0)
                def _reset() -> None:
                    shared.d_after_reset[...] = load_row(shared.d_after_reset) + load_row(shared.d_state.at[1 - slot])
                    shared.d_state[1 - slot] = zero_row(size)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.d_feedback.at[slot], target.d_feedback.at[b, p, n])

        shared.d_after_reset[...] = zero_row(size)
        plgpu.copy_gmem_to_smem(source.d_final.at[b, p], shared.d_state.at[0], shared.states_loaded)
        plgpu.copy_gmem_to_smem(source.anchor.at[b, p], shared.anchor, shared.states_loaded)
        load(count - 1, 0)
        plgpu.barrier_wait(shared.states_loaded)
        lax.fori_loop(0, count, chunk, None)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.d_state.at[count % 2], target.d_initial.at[b, p])
        plgpu.copy_smem_to_gmem(shared.d_after_reset, target.d_after_reset.at[b, p])
        plgpu.wait_smem_to_gmem(0)

    rows = adjoint_rows(size, chunks.k.dtype, d_out.dtype) | {"loaded": plgpu.Barrier(num_arrivals=3)}
    found = launch(
        body,
        "hypergradient_walk_back",
        inputs={
            "k": chunks.k,
            "gates": chunks.gates,
            **prepared._asdict(),
            "sequential": chunks.sequential,
            "d_final": d_final,
            "anchor": chunks.anchor,
            "d": d,
            "d_out": None if d is None else d_out,
        },
        out={
            "d_feedback": jax.ShapeDtypeStruct((batch, heads, count, CHUNK), jnp.float32),
            "d_after": jax.ShapeDtypeStruct((batch, heads, count, size), jnp.float32),
            "d_initial": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
            "d_after_reset": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        },
        scratch={
            "k": smem(2, slabs, CHUNK, width, dtype=chunks.k.dtype),
            "gates": plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
            "inverse": smem(2, CHUNK, CHUNK, dtype=jnp.float32),
            "d_coefficient": plgpu.SMEM((2, CHUNK), jnp.float32),
            "d_start": plgpu.SMEM((2, size), jnp.float32),
            "d_state": plgpu.SMEM((2, size), jnp.float32),
            "d_feedback": plgpu.SMEM((2, CHUNK), jnp.float32),
            "per_token": plgpu.SMEM((CHUNK,), jnp.float32),
            "d_after_reset": plgpu.SMEM((size,), jnp.float32),
            "anchor": plgpu.SMEM((size,), jnp.float32),
            "states_loaded": plgpu.Barrier(num_arrivals=2),
            "chunk_loaded": plgpu.Barrier(num_arrivals=slabs + 4, num_barriers=2),
            "rows": rows if options.may_run_sequentially else None,
        },
        grid={"batch": batch, "head": heads},
        interpret=options.interpret,
        automatic_barriers=True,
    )
    return Cotangents(**vars(found))
