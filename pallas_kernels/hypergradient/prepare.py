"""The computations of the hypergradient preconditioner that need no state, in parallel over all chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.inverse import SCRATCH as INVERSE
from pallas_kernels.common.inverse import unit_lower_inverse
from pallas_kernels.common.launch import BlockIndex, Phases, launch
from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
    column_scale,
    products,
    read,
    row_scale,
    smem,
    split,
    split_terms,
    zero_rows,
)
from pallas_kernels.hypergradient.chunk import (
    BETA,
    DECAY_BEFORE,
    GATES,
    STEP,
    HypergradientOptions,
    channels,
    decay_between,
    decay_between_transposed,
    fold_slabs,
    halves_of,
    halves_tile,
    squares,
    sum_rows_of,
    sum_rows_tile,
)


class Prepared(NamedTuple):
    """Results of `prepare`, float32."""

    inverse: jax.Array  # (I + L)^-1 [B, P, N, 64, 64]
    d_coefficient: jax.Array | None  # sum_{j > i} E_ji <u_i, g_j> for token i [B, P, N, 64]
    d_start: jax.Array | None  # sum_j decay_j g_j [B, P, N, K]


def prepare(k: jax.Array, gates: jax.Array, d_out: jax.Array | None, options: HypergradientOptions) -> Prepared:
    """Return (I + L)^-1 of every chunk and, for the gradient, the effect of the cotangents g of d within the chunk.

    They add `d_coefficient` to the cotangent of step * feedback of each token, and `d_start` to that of d before the
    chunk.

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, GATES, 64].
        d_out: cotangent of d, [B, T, P, K] float32, or with `options.return_write_key` of d k, in the type of k. None
            for the forward pass.
        options: of the kernel.
    """
    batch, _, heads, size = k.shape
    count, slabs = gates.shape[2], size // SLAB
    backward = d_out is not None

    def result(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, heads, count, *shape), jnp.float32)

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        u, store = shared.phases.solve.u, shared.phases.store
        decay, g = halves_of(store.decay), halves_of(store.g)
        b, p, n = index("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)
        for slab in range(slabs):
            plgpu.copy_gmem_to_smem(source.k.at[b, rows, p, channels(slab)], shared.k.at[slab], shared.loaded)
            if backward:
                d_out_slab = source.d_out.at[b, rows, p, channels(slab)]
                plgpu.copy_gmem_to_smem(d_out_slab, shared.d_out.at[slab], shared.d_out_loaded)
        plgpu.copy_gmem_to_smem(source.gates.at[b, p, n], shared.gates, shared.loaded)
        plgpu.copy_gmem_to_smem(sum_rows_of(source.gates.at[b, p, n]), shared.sum_rows, shared.loaded)
        plgpu.barrier_wait(shared.loaded)
        for slab in range(slabs):
            split(squares(shared.k.at[slab]), *halves_of(u, slab))
        plgpu.commit_smem()
        pairs: list[tuple[Any, Any]] = []
        for slab in range(slabs):
            pairs += [(x, y.T) for x, y in split_terms(halves_of(u, slab), halves_of(u, slab))]
        lower = products(pairs)[0] * decay_between(shared.gates, shared.sum_rows, options)
        lower = lower * row_scale(shared.gates.at[BETA], lower) * column_scale(shared.gates.at[STEP], lower)
        plgpu.commit_smem()  # the squared keys are dead: the inverse reuses their shared memory
        inverse = unit_lower_inverse(lower, shared.phases.inverse)
        plgpu.commit_smem()  # the operands of the inverse are dead: the results reuse their shared memory
        store.inverse[...] = inverse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(store.inverse, target.inverse.at[b, p, n])
        if backward:
            split(decay_between_transposed(shared.gates, shared.sum_rows, options), *decay)
            plgpu.barrier_wait(shared.d_out_loaded)

            def add(slab: Any, sums: jax.Array) -> jax.Array:
                cotangents = read(shared.d_out.at[slab])
                if options.return_write_key:
                    cotangents = cotangents * read(shared.k.at[slab])
                split(cotangents, *g)
                if options.forget:
                    cotangents = cotangents * row_scale(shared.gates.at[DECAY_BEFORE], cotangents)
                shared.d_start[channels(slab)] = jnp.sum(cotangents, axis=0)
                plgpu.commit_smem()
                d_added = products(split_terms(decay, g, short=not options.forget))[0]
                plgpu.commit_smem()  # the operands are dead: the next slab overwrites them
                return sums + jnp.sum(d_added * squares(shared.k.at[slab]), axis=1)

            shared.d_coefficient[...] = fold_slabs(slabs, add, zero_rows(CHUNK))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.d_coefficient, target.d_coefficient.at[b, p, n])
            plgpu.copy_smem_to_gmem(shared.d_start, target.d_start.at[b, p, n])
        plgpu.wait_smem_to_gmem(0)

    inputs = {"k": k, "gates": gates, "d_out": d_out}
    out = {
        "inverse": result(CHUNK, CHUNK),
        "d_coefficient": result(CHUNK) if backward else None,
        "d_start": result(size) if backward else None,
    }
    scratch = {
        "k": smem(slabs, CHUNK, SLAB, dtype=k.dtype),
        "gates": plgpu.SMEM((GATES, CHUNK), jnp.float32),
        "sum_rows": sum_rows_tile(),
        "d_coefficient": plgpu.SMEM((CHUNK,), jnp.float32),
        "d_start": plgpu.SMEM((size,), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=slabs + 2),
        "d_out_loaded": plgpu.Barrier(num_arrivals=slabs),
        "d_out": plgpu.SMEM((1,), jnp.float32) if d_out is None else smem(slabs, CHUNK, SLAB, dtype=d_out.dtype),
        "phases": Phases(
            solve={"u": halves_tile(slabs)},
            inverse=INVERSE,
            store={"inverse": smem(CHUNK, CHUNK, dtype=jnp.float32), "decay": halves_tile(), "g": halves_tile()},
        ),
    }
    found = launch(
        body,
        "hypergradient_prepare",
        inputs=inputs,
        out=out,
        scratch=scratch,
        grid={"batch": batch, "chunk": count, "head": heads},
        interpret=options.interpret,
    )
    return Prepared(**vars(found))
