"""The gradients of the arrays that a chunk reads, from the results of `scan_backward`, in parallel over all chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import BlockIndex, Phases, launch
from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
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
from pallas_kernels.hypergradient.chunk import (
    ANCHOR_WEIGHT,
    BETA,
    FORGET,
    GATES,
    RESET,
    STEP,
    TO_END,
    Chunks,
    HypergradientOptions,
    channels,
    closed_form,
    decay_between_transposed,
    fold_slabs,
    halves_of,
    halves_tile,
    sum_rows_of,
    sum_rows_tile,
    write_weights,
)
from pallas_kernels.hypergradient.scan_backward import Cotangents
from pallas_kernels.hypergradient.tokens import (
    LOADED_TOKENS,
    adjoint_rows,
    load_row,
    scan_tokens_backward,
    split_reset_cotangent,
    token_vjp,
    zero_row,
)

# Rows of the gradients of the gates of a chunk.
D_STEP, D_BETA, D_LOG_FORGET = range(3)


class Gradients(NamedTuple):
    """Results of `gradients`."""

    d_k: jax.Array  # [B, T, P, K] in the type of k
    d_gates: jax.Array  # of step, beta and log_forget [B, P, N, 3, 64] float32
    d_anchor: jax.Array | None  # by chunk [B, P, N, K] float32


def gradients(
    chunks: Chunks,
    d: jax.Array | None,
    d_out: jax.Array,
    cotangents: Cotangents,
    options: HypergradientOptions,
) -> Gradients:
    """Return the gradients of k, of the gates and, if anchored, of the anchor.

    Args:
        chunks: of `scan`.
        d: [B, T, P, K] float32, of `expand`; read in sequential chunks. None if there are none.
        d_out: cotangent of d, or with `options.return_write_key` of d k.
        cotangents: of `scan_backward`.
        options: of the kernel.
    """
    batch, length, heads, size = chunks.k.shape
    count, slabs = length // CHUNK, size // SLAB
    leading = (batch, heads, count)

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        b, p, n = index("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)
        gates = shared.gates

        def run_chunk() -> None:
            local, loaded = shared.phases.chunk, shared.chunk_loaded
            u_or_g, weights, decay = (halves_of(halves) for halves in (local.u_or_g, local.weights, local.decay))
            for slab in range(slabs):
                for ref, tile in [(source.k, local.k), (source.d_out, local.d_out)]:
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, p, channels(slab)], tile.at[slab], loaded)
            plgpu.copy_gmem_to_smem(source.start.at[b, p, n], local.start, loaded)
            plgpu.copy_gmem_to_smem(source.feedback.at[b, p, n], local.feedback, loaded)
            plgpu.copy_gmem_to_smem(source.d_feedback.at[b, p, n], local.d_feedback, loaded)
            plgpu.copy_gmem_to_smem(sum_rows_of(source.gates.at[b, p, n]), local.sum_rows, loaded)
            plgpu.barrier_wait(loaded)
            split(decay_between_transposed(gates, local.sum_rows, options), *decay)
            write_weights(local.feedback, gates, local.sum_rows, weights, options)

            def add(slab: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                columns, keys = channels(slab), local.k.at[slab]
                states = local.start.at[columns], shared.anchor.at[columns]
                d = closed_form(keys, *states, gates, u_or_g, weights, options)
                beta_d_feedback = read_rows(gates.at[BETA]) * read_rows(local.d_feedback)
                k = read(keys)
                predicted = jnp.sum(k * k * d, axis=1)
                g = read(local.d_out.at[slab])
                if options.return_write_key:
                    g = g * k
                split(g - along_columns(beta_d_feedback, k) * (k * k), *u_or_g)
                plgpu.commit_smem()
                from_later = products(split_terms(decay, u_or_g, short=not options.forget))[0]
                d_added = column_scale(shared.d_after.at[columns], from_later)
                if options.forget:
                    d_added = d_added * row_scale(gates.at[TO_END], d_added)
                d_added = d_added + from_later
                # Read k again here: held over the product, these values take too many registers.
                k, coefficient = read(keys), read_rows(gates.at[STEP]) * read_rows(local.feedback)
                d_u = along_columns(coefficient, d) * d_added - along_columns(beta_d_feedback, d) * d
                d_k = 2.0 * (k * d_u)
                if options.return_write_key:
                    d_k = d_k + read(local.d_out.at[slab]) * d
                sums = (sums[0] + predicted, sums[1] + jnp.sum(d_added * (k * k), axis=1), *sums[2:])
                keys[...] = d_k.astype(source.k.dtype)
                if options.anchored:
                    d = d - column_scale(shared.anchor.at[columns], d)
                    shared.d_anchor[columns] = jnp.sum(d_added * row_scale(gates.at[ANCHOR_WEIGHT], d_added), axis=0)
                return (*sums[:2], sums[2] + jnp.sum(d_added * d, axis=1)) if options.forget else sums

            sums = fold_slabs(slabs, add, (zero_rows(CHUNK),) * (2 + options.forget))
            shared.d_gates[D_BETA] = -(read_rows(local.d_feedback) * sums[0])
            shared.d_gates[D_STEP] = sums[1] * read_rows(local.feedback)
            if options.forget:
                shared.d_gates[D_LOG_FORGET] = sums[2] * read_rows(gates.at[FORGET])
            plgpu.commit_smem()
            for slab in range(slabs):
                plgpu.copy_smem_to_gmem(local.k.at[slab], target.d_k.at[b, rows, p, channels(slab)])

        def run_sequentially() -> None:
            def rows_from(first: Any) -> list[Any]:
                rows = pl.ds(n * CHUNK + first, LOADED_TOKENS)
                return [ref.at[b, rows, p] for ref in (source.k, source.d, source.d_out)]

            def step(t: Any, token: list[Any], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                gate = lambda row: gates[row, t]
                k, d, d_out = (load_row(ref) for ref in token)
                d_used = d_out * k if options.return_write_key else d_out
                adjoint = token_vjp(carry[0], d_used, d, k * k, gate, shared.anchor, options)
                d_feedback = gate(STEP) * adjoint.d_coefficient
                d_u = (gate(STEP) * adjoint.feedback) * adjoint.d_updated - (gate(BETA) * d_feedback) * d
                d_k = 2.0 * (k * d_u)
                if options.return_write_key:
                    d_k = d_k + d_out * d
                target.d_k[b, n * CHUNK + t, p] = d_k.astype(source.k.dtype)
                shared.d_gates[D_STEP, t] = adjoint.d_coefficient * adjoint.feedback
                shared.d_gates[D_BETA, t] = -(d_feedback * adjoint.predicted)
                if options.anchored:
                    d = d - load_row(shared.anchor)
                    shared.d_anchor[...] = load_row(shared.d_anchor) + gate(ANCHOR_WEIGHT) * adjoint.d_updated
                if options.forget:
                    shared.d_gates[D_LOG_FORGET, t] = gate(FORGET) * jnp.sum(adjoint.d_updated * d)
                d_before = adjoint.d_before
                return (split_reset_cotangent(gate(RESET), d_before)[0] if options.resets else d_before,)

            carry = (load_row(shared.d_after),)
            scan_tokens_backward(rows_from, shared.phases.rows, shared.rows_loaded, step, carry)

        plgpu.copy_gmem_to_smem(source.gates.at[b, p, n], gates, shared.loaded)
        plgpu.copy_gmem_to_smem(source.d_after.at[b, p, n], shared.d_after, shared.loaded)
        plgpu.copy_gmem_to_smem(source.anchor.at[b, p], shared.anchor, shared.loaded)
        if not options.forget:
            shared.d_gates[D_LOG_FORGET] = zero_row(CHUNK)
        if options.anchored:
            shared.d_anchor[...] = zero_row(size)
        plgpu.barrier_wait(shared.loaded)
        if options.may_run_sequentially:
            sequential = source.sequential[b, p, n] > 0
            pl.when(sequential)(run_sequentially)
            pl.when(jnp.logical_not(sequential))(run_chunk)
        else:
            run_chunk()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.d_gates, target.d_gates.at[b, p, n])
        if options.anchored:
            plgpu.copy_smem_to_gmem(shared.d_anchor, target.d_anchor.at[b, p, n])
        plgpu.wait_smem_to_gmem(0)

    d_anchor = jax.ShapeDtypeStruct((*leading, size), jnp.float32)
    chunk = {
        "k": smem(slabs, CHUNK, SLAB, dtype=chunks.k.dtype),
        "d_out": smem(slabs, CHUNK, SLAB, dtype=d_out.dtype),
        "sum_rows": sum_rows_tile(),
        "start": plgpu.SMEM((size,), jnp.float32),
        "feedback": plgpu.SMEM((CHUNK,), jnp.float32),
        "d_feedback": plgpu.SMEM((CHUNK,), jnp.float32),
        "u_or_g": halves_tile(),
        "weights": halves_tile(),
        "decay": halves_tile(),
    }
    rows = adjoint_rows(size, chunks.k.dtype, d_out.dtype)
    found = launch(
        body,
        "hypergradient_finish",
        inputs={
            "k": chunks.k,
            "gates": chunks.gates,
            "start": chunks.start,
            "feedback": chunks.feedback,
            "sequential": chunks.sequential,
            "d_out": d_out,
            "d_feedback": cotangents.d_feedback,
            "d_after": cotangents.d_after,
            "anchor": chunks.anchor,
            "d": d,
        },
        out={
            "d_k": jax.ShapeDtypeStruct(chunks.k.shape, chunks.k.dtype),
            "d_gates": jax.ShapeDtypeStruct((*leading, 3, CHUNK), jnp.float32),
            "d_anchor": d_anchor if options.anchored else None,
        },
        scratch={
            # A block runs its chunk in closed form or token by token, so the two share memory.
            "phases": Phases(chunk=chunk, rows=rows) if options.may_run_sequentially else {"chunk": chunk},
            "gates": plgpu.SMEM((GATES, CHUNK), jnp.float32),
            "d_after": plgpu.SMEM((size,), jnp.float32),
            "anchor": plgpu.SMEM((size,), jnp.float32),
            "d_gates": plgpu.SMEM((3, CHUNK), jnp.float32),
            "d_anchor": plgpu.SMEM((size,), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=3),
            "chunk_loaded": plgpu.Barrier(num_arrivals=2 * slabs + 4),
            "rows_loaded": plgpu.Barrier(num_arrivals=3),
        },
        grid={"batch": batch, "chunk": count, "head": heads},
        interpret=options.interpret,
        automatic_barriers=True,
    )
    return Gradients(**vars(found))
