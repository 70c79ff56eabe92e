"""The forward scan over chunks of the hypergradient preconditioner: one block per batch and head keeps the state.

The chain from one chunk to the next decides how long the scan takes. So it computes no more than the next chunk needs,
the feedback of every token and d after the last one: three products with a vector. `expand` does the rest, in parallel
over all chunks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import BlockIndex, launch
from pallas_kernels.common.tiles import CHUNK, SLAB, column_scale, indices, read_rows, smem, zero_rows
from pallas_kernels.hypergradient.chunk import (
    BETA,
    DECAY_BEFORE,
    FORGET,
    GATES,
    RESET,
    RESET_INSIDE,
    SCAN_SLAB,
    STEP,
    TO_END,
    Chunks,
    HypergradientOptions,
    channels,
    closed_form,
    fold_slabs,
    halves_of,
    halves_tile,
    read_by_channel,
    read_by_token,
    squares,
    squares_transposed,
    sum_over_tokens,
    sum_rows_of,
    sum_rows_tile,
    write_weights,
    zero_channels,
)
from pallas_kernels.hypergradient.tokens import LOADED_TOKENS, key_rows, load_row, out_of_bounds, scan_tokens

# Relative safety margins of the bound test, far above the rounding errors of `expand`: of the sum of the terms of one
# sign, and of the decayed d from before the chunk.
_SUM_MARGIN, _START_MARGIN = 2.0**-12, 2.0**-18


def scan(
    k: jax.Array,
    gates: jax.Array,
    inverse: jax.Array,
    initial: jax.Array,
    after_reset: jax.Array,
    anchor: jax.Array,
    options: HypergradientOptions,
) -> tuple[Chunks, jax.Array]:
    """Return the chunks with d before each, the feedback and the sequential ones, and d after the last [B, P, K].

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        inverse: of `prepare`.
        initial: d before the first chunk [B, P, K] float32.
        after_reset: d after a reset [B, P, K] float32.
        anchor: [B, P, K] float32.
        options: of the kernel.
    """
    batch, length, heads, size = k.shape
    count, width = length // CHUNK, min(size, SCAN_SLAB)
    slabs = size // width
    leading = (batch, heads, count)

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        b, p = index("batch", "head")

        def load(n: Any, slot: Any) -> None:
            loaded = shared.chunk_loaded.at[slot]
            for slab in range(slabs):
                keys = source.k.at[b, pl.ds(n * CHUNK, CHUNK), p, channels(slab, width)]
                plgpu.copy_gmem_to_smem(keys, shared.k.at[slot, slab], loaded)
            plgpu.copy_gmem_to_smem(source.gates.at[b, p, n], shared.gates.at[slot], loaded)
            plgpu.copy_gmem_to_smem(source.inverse.at[b, p, n], shared.inverse.at[slot], loaded)

        def solve(slot: Any) -> jax.Array:
            """Return the feedback of every token."""
            gates = shared.gates.at[slot]

            def predict(slab: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                u = squares(shared.k.at[slot, slab])
                origin = column_scale(shared.d.at[slot, channels(slab, width)], u)
                if not options.anchored:
                    return (sums[0] + jnp.sum(u * origin, axis=1),)
                anchor = column_scale(shared.anchor.at[channels(slab, width)], u)
                origin = origin - anchor
                return sums[0] + jnp.sum(u * origin, axis=1), sums[1] + jnp.sum(u * anchor, axis=1)

            predicted, *by_anchor = fold_slabs(slabs, predict, (zero_rows(CHUNK),) * (1 + options.anchored))
            if options.forget:
                predicted = predicted * read_rows(gates.at[DECAY_BEFORE])
            if options.anchored:
                predicted = predicted + by_anchor[0]
            shared.per_token[...] = 1.0 - read_rows(gates.at[BETA]) * predicted
            inverse = plgpu.load(shared.inverse.at[slot], layout=plgpu.Layout.WGMMA)
            return jnp.sum(inverse * column_scale(shared.per_token, inverse), axis=1)

        def advance(slot: Any) -> Any:
            """Write d after the chunk; return a value above 0 if a d inside the chunk may be out of bounds.

            The contribution of a token never grows after it. So every d of a channel is at least the smaller of d
            before the chunk and its decayed value at the end, plus all negative contributions; and at most the larger
            of the two, plus all positive ones.
            """
            gates = shared.gates.at[slot]
            chunk_decay = shared.gates[slot, DECAY_BEFORE, CHUNK - 1] * shared.gates[slot, FORGET, CHUNK - 1]
            coefficient = read_by_token(shared.feedback.at[slot]) * read_by_token(gates.at[STEP])
            to_end = coefficient * read_by_token(gates.at[TO_END]) if options.forget else coefficient

            def add(slab: Any, suspects: jax.Array) -> jax.Array:
                u = squares_transposed(shared.k.at[slot, slab])
                start = read_by_channel(shared.d.at[slot, channels(slab, width)])
                decayed = start * chunk_decay if options.forget else start
                if options.anchored:
                    anchor = read_by_channel(shared.anchor.at[channels(slab, width)])
                    decayed = anchor + chunk_decay * (start - anchor)
                if options.bounds is None:
                    shared.d[1 - slot, channels(slab, width)] = decayed + sum_over_tokens(u, to_end)
                    return suspects
                up = sum_over_tokens(u, jnp.maximum(coefficient, 0.0))
                down = sum_over_tokens(u, jnp.minimum(coefficient, 0.0))
                added = sum_over_tokens(u, to_end) if options.forget else up + down
                shared.d[1 - slot, channels(slab, width)] = decayed + added
                least, most = jnp.minimum(start, decayed), jnp.maximum(start, decayed)
                if options.anchored:
                    margin = (jnp.abs(start) + jnp.abs(anchor)) * _START_MARGIN
                    least, most = least - margin, most + margin
                elif options.forget:  # the margin keeps the sign, so that 0 as a bound holds under any decay
                    least, most = least - jnp.abs(least) * _START_MARGIN, most + jnp.abs(most) * _START_MARGIN
                least, most = least + down * (1.0 + _SUM_MARGIN), most + up * (1.0 + _SUM_MARGIN)
                infinite = jnp.where(up - down < jnp.inf, 0.0, 1.0)
                return suspects + out_of_bounds(least, options) + out_of_bounds(most, options) + infinite

            suspects = fold_slabs(slabs, add, zero_channels(width))
            return 0.0 if options.bounds is None else jnp.sum(suspects)

        def count_out_of_bounds(n: Any, slot: Any) -> Any:
            """Return how many values of the chunk, as `expand` would write them, are out of bounds."""
            test = shared.test
            u, weights = halves_of(test.u), halves_of(test.weights)
            plgpu.copy_gmem_to_smem(sum_rows_of(source.gates.at[b, p, n]), test.sum_rows, test.loaded)
            plgpu.barrier_wait(test.loaded)
            write_weights(shared.feedback.at[slot], shared.gates.at[slot], test.sum_rows, weights, options)
            first = indices((CHUNK, SLAB))[0] == 0

            def add(slab: Any, counts: jax.Array) -> jax.Array:
                for begin in range(0, width, SLAB):
                    columns = pl.ds(slab * width + begin, SLAB)
                    keys = shared.k.at[slot, slab, :, pl.ds(begin, SLAB)]
                    states = shared.d.at[slot, columns], shared.anchor.at[columns]
                    d = closed_form(keys, *states, shared.gates.at[slot], u, weights, options)
                    counts = counts + jnp.sum(jnp.where(first, 0.0, out_of_bounds(d, options)), axis=1)
                return counts

            shared.per_token[...] = fold_slabs(slabs, add, zero_rows(CHUNK))
            after = out_of_bounds(load_row(shared.d.at[1 - slot]), options)
            return jnp.sum(load_row(shared.per_token)) + jnp.sum(after)

        def run_sequentially(n: Any, slot: Any) -> None:
            keys_from = lambda first: source.k.at[b, pl.ds(n * CHUNK + first, LOADED_TOKENS), p]
            start, gates = load_row(shared.d.at[slot]), shared.gates.at[slot]
            shared.d[1 - slot] = scan_tokens(start, keys_from, shared, gates, shared.rows, options=options)

        def chunk(n: Any, _: Any) -> None:
            slot = lax.rem(n, jnp.int32(2))
            pl.when(n + 1 < count)(lambda: load(n + 1, 1 - slot))
            plgpu.barrier_wait(shared.chunk_loaded.at[slot])
            if options.resets:

                @pl.when(shared.gates[slot, RESET, 0] > 0.0)
                def _reset() -> None:
                    shared.d[slot] = load_row(shared.after_reset)
                    plgpu.commit_smem()

            plgpu.copy_smem_to_gmem(shared.d.at[slot], target.start.at[b, p, n])
            feedback = solve(slot)
            # Wait for the stores from feedback[slot], two chunks ago, and from d[1 - slot], one chunk ago.
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)
            shared.feedback[slot] = feedback
            suspects = advance(slot)
            if options.may_run_sequentially:
                reset_inside = shared.gates[slot, RESET_INSIDE, 0]
                if options.bounds is not None:
                    test = (suspects > 0.0) & (reset_inside == 0.0)
                    suspects = lax.cond(test, lambda: count_out_of_bounds(n, slot), lambda: 0.0)
                sequential = (suspects + reset_inside) > 0.0
                target.sequential[b, p, n] = sequential.astype(jnp.int32)
                pl.when(sequential)(lambda: run_sequentially(n, slot))
            else:
                target.sequential[b, p, n] = jnp.int32(0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.feedback.at[slot], target.feedback.at[b, p, n])

        plgpu.copy_gmem_to_smem(source.initial.at[b, p], shared.d.at[0], shared.states_loaded)
        plgpu.copy_gmem_to_smem(source.after_reset.at[b, p], shared.after_reset, shared.states_loaded)
        plgpu.copy_gmem_to_smem(source.anchor.at[b, p], shared.anchor, shared.states_loaded)
        load(0, 0)
        plgpu.barrier_wait(shared.states_loaded)
        lax.fori_loop(0, count, chunk, None)
        plgpu.copy_smem_to_gmem(shared.d.at[count % 2], target.final.at[b, p])
        plgpu.wait_smem_to_gmem(0)

    bound_test = {
        "sum_rows": sum_rows_tile(),
        "u": halves_tile(),
        "weights": halves_tile(),
        "loaded": plgpu.Barrier(),
    }
    found = launch(
        body,
        "hypergradient_walk",
        inputs={
            "k": k,
            "gates": gates,
            "inverse": inverse,
            "initial": initial,
            "after_reset": after_reset,
            "anchor": anchor,
        },
        out={
            "start": jax.ShapeDtypeStruct((*leading, size), jnp.float32),
            "feedback": jax.ShapeDtypeStruct((*leading, CHUNK), jnp.float32),
            "final": jax.ShapeDtypeStruct(initial.shape, jnp.float32),
            "sequential": jax.ShapeDtypeStruct(leading, jnp.int32),
        },
        scratch={
            "k": smem(2, slabs, CHUNK, width, dtype=k.dtype),
            "gates": plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
            "inverse": smem(2, CHUNK, CHUNK, dtype=jnp.float32),
            "d": plgpu.SMEM((2, size), jnp.float32),
            "feedback": plgpu.SMEM((2, CHUNK), jnp.float32),
            "per_token": plgpu.SMEM((CHUNK,), jnp.float32),
            "after_reset": plgpu.SMEM((size,), jnp.float32),
            "anchor": plgpu.SMEM((size,), jnp.float32),
            "states_loaded": plgpu.Barrier(num_arrivals=3),
            "chunk_loaded": plgpu.Barrier(num_arrivals=slabs + 2, num_barriers=2),
            "rows": key_rows(size, k.dtype) if options.may_run_sequentially else None,
            "test": bound_test if options.bounds is not None else None,
        },
        grid={"batch": batch, "head": heads},
        interpret=options.interpret,
        automatic_barriers=True,
    )
    chunks = Chunks(k, gates, found.start, found.feedback, found.sequential, after_reset, anchor)
    return chunks, found.final
