"""d before every token, or its write key, from d before each chunk, in parallel over all chunks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import BlockIndex, launch
from pallas_kernels.common.tiles import CHUNK, SLAB, read, smem
from pallas_kernels.hypergradient.chunk import (
    GATES,
    Chunks,
    HypergradientOptions,
    channels,
    closed_form,
    fold_slabs,
    halves_of,
    halves_tile,
    sum_rows_of,
    sum_rows_tile,
    write_weights,
)
from pallas_kernels.hypergradient.tokens import LOADED_TOKENS, key_rows, load_row, scan_tokens


def expand(
    chunks: Chunks, *, options: HypergradientOptions, return_write_key: bool, sequential_only: bool = False
) -> jax.Array:
    """Return d before every token [B, T, P, K] float32, or the write keys d k in the type of k.

    A sequential chunk is computed token by token here as in `scan`, which therefore has no rows to write.

    Args:
        chunks: of `scan`.
        options: of the kernel.
        return_write_key: return the write keys.
        sequential_only: compute only the sequential chunks and leave the others undefined; default False.
    """
    batch, length, heads, size = chunks.k.shape
    count, slabs = length // CHUNK, size // SLAB

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        b, p, n = index("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)

        def expand_chunk() -> None:
            local = shared.chunk
            u, weights = halves_of(local.u), halves_of(local.weights)
            for slab in range(slabs):
                plgpu.copy_gmem_to_smem(source.k.at[b, rows, p, channels(slab)], local.k.at[slab], local.loaded)
            plgpu.copy_gmem_to_smem(sum_rows_of(source.gates.at[b, p, n]), local.sum_rows, local.loaded)
            plgpu.copy_gmem_to_smem(source.feedback.at[b, p, n], local.feedback, local.loaded)
            plgpu.barrier_wait(local.loaded)
            write_weights(local.feedback, shared.gates, local.sum_rows, weights, options)

            def write(slab: Any, _: Any) -> None:
                columns, keys = channels(slab), local.k.at[slab]
                states = shared.start.at[columns], shared.anchor.at[columns]
                d = closed_form(keys, *states, shared.gates, u, weights, options)
                if return_write_key:
                    out = keys  # the write keys overwrite the keys
                    out[...] = (d * read(keys)).astype(source.k.dtype)
                else:
                    out = local.out
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out[...] = d
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, target.out.at[b, rows, p, columns])

            fold_slabs(slabs, write, None)
            plgpu.wait_smem_to_gmem(0)

        def expand_sequentially() -> None:
            def write(t: Any, key: jax.Array, d: jax.Array) -> None:
                target.out[b, n * CHUNK + t, p] = (d * key if return_write_key else d).astype(target.out.dtype)

            keys_from = lambda first: source.k.at[b, pl.ds(n * CHUNK + first, LOADED_TOKENS), p]
            start = load_row(shared.start)
            scan_tokens(start, keys_from, shared, shared.gates, shared.rows, options=options, write=write)

        def load_and(run: Callable[[], None]) -> None:
            plgpu.copy_gmem_to_smem(source.gates.at[b, p, n], shared.gates, shared.loaded)
            plgpu.copy_gmem_to_smem(source.start.at[b, p, n], shared.start, shared.loaded)
            plgpu.copy_gmem_to_smem(source.after_reset.at[b, p], shared.after_reset, shared.loaded)
            plgpu.copy_gmem_to_smem(source.anchor.at[b, p], shared.anchor, shared.loaded)
            plgpu.barrier_wait(shared.loaded)
            run()

        if not options.may_run_sequentially:
            load_and(expand_chunk)
            return
        sequential = source.sequential[b, p, n] > 0
        pl.when(sequential)(lambda: load_and(expand_sequentially))
        if not sequential_only:
            pl.when(jnp.logical_not(sequential))(lambda: load_and(expand_chunk))

    out = jax.ShapeDtypeStruct(chunks.k.shape, chunks.k.dtype if return_write_key else jnp.float32)
    chunk = {
        "k": smem(slabs, CHUNK, SLAB, dtype=chunks.k.dtype),
        "out": plgpu.SMEM((1,), jnp.float32) if return_write_key else smem(CHUNK, SLAB, dtype=jnp.float32),
        "sum_rows": sum_rows_tile(),
        "feedback": plgpu.SMEM((CHUNK,), jnp.float32),
        "u": halves_tile(),
        "weights": halves_tile(),
        "loaded": plgpu.Barrier(num_arrivals=slabs + 2),
    }
    return launch(
        body,
        "hypergradient_expand",
        inputs=chunks._asdict(),
        out={"out": out},
        scratch={
            "gates": plgpu.SMEM((GATES, CHUNK), jnp.float32),
            "start": plgpu.SMEM((size,), jnp.float32),
            "after_reset": plgpu.SMEM((size,), jnp.float32),
            "anchor": plgpu.SMEM((size,), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=4),
            "rows": key_rows(size, chunks.k.dtype) if options.may_run_sequentially else None,
            "chunk": None if sequential_only else chunk,  # less shared memory leaves room for more blocks
        },
        grid={"batch": batch, "chunk": count, "head": heads},
        interpret=options.interpret,
        automatic_barriers=True,
    ).out
