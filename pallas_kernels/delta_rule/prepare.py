"""The work in a chunk that does not depend on the state: scores and the inverse. Parallel over chunks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import pair_decay, pair_rows_of, pair_rows_tile
from pallas_kernels.common.inverse import SCRATCH as INVERSE
from pallas_kernels.common.inverse import times_inverse, unit_lower_inverse
from pallas_kernels.common.launch import BlockIndex, Phases, launch
from pallas_kernels.common.tiles import CHUNK, product, products, row_scale, smem, split
from pallas_kernels.common.token_gates import BETA, GATES, TO_END


class DeltaRuleOptions(NamedTuple):
    """Options that are fixed when a kernel is built."""

    scale: float
    erase: bool
    decay: bool  # scalar decay: the gates COARSE and FINE hold its sum since the start of the chunk
    resets: bool  # the gate SEGMENT counts the resets since the start of the chunk
    interpret: bool
    splits: int | None = None  # of the sequence; None: `split_count` chooses

    @property
    def gated(self) -> bool:
        """Return True if the gates FROM_START and TO_END can differ from 1."""
        return self.decay or self.resets


class Chunks(NamedTuple):
    """Inputs of both scans: everything about every chunk that does not depend on the state."""

    q: jax.Array  # [B, T, Hk, K]; under a decay per channel decayed from the start of its chunk, [B, T, H, K]
    k: jax.Array  # the same
    w: jax.Array  # [B, T, Hw, K]; under a decay per channel decayed to the end of its chunk, [B, T, H, K]
    gates: jax.Array  # [B, H, N, GATES, 64] float32
    carry: jax.Array | None  # decay of the state over a chunk, per channel [B, H, N, K]; None: the last FROM_START
    scores: jax.Array  # P (I + A)^-1, or P without erase [B, H, N, 64, 64]
    solved: jax.Array | None  # (I + A)^-T w, decayed to the end of the chunk [B, T, H, K]; None without erase
    inverse: list[jax.Array] | None  # the halves (high, low) of (I + A)^-1 [B, H, N, 64, 64]; only for a gradient


def prepare(
    q: jax.Array, k: jax.Array, w: jax.Array, gates: jax.Array, options: DeltaRuleOptions, *, gradient: bool
) -> Chunks:
    """Prepare the chunks without decay or under a scalar one.

    A_ij = beta_i <k_i, w_j> decay_ij below the diagonal, and P_ij = scale <q_i, w_j> decay_ij on and below it. If keys
    are nearly parallel, P and w have nearly equal rows whose small differences matter: they are multiplied by the
    inverse to about float32 precision, and only the products are rounded.

    Args:
        q, k: [B, T, Hk, K], T a multiple of 64.
        w: write keys [B, T, Hw, K].
        gates: [B, H, N, GATES, 64].
        options: fixed options of the kernels.
        gradient: return the inverse too.
    """
    batch, length, key_heads, key_dim = q.shape
    heads, count = gates.shape[1:3]
    invert = options.erase and gradient
    square = jax.ShapeDtypeStruct((batch, heads, count, CHUNK, CHUNK), q.dtype)
    solved = jax.ShapeDtypeStruct((batch, length, heads, key_dim), q.dtype)
    out = {
        "scores": square,
        "solved": solved if options.erase else None,
        "inverse": [square, square] if invert else None,
    }

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        load, store = shared.phases.load, shared.phases.store
        w_s, gates_s, loaded = shared.w, shared.gates, shared.loaded
        b, h, n = index("batch", "head", "chunk")
        rows = pl.ds(n * CHUNK, CHUNK)
        key_head, write_head = lax.div(h, heads // key_heads), lax.div(h, heads // w.shape[2])
        plgpu.copy_gmem_to_smem(source.q.at[b, rows, key_head], load.q, loaded)
        plgpu.copy_gmem_to_smem(source.w.at[b, rows, write_head], w_s, loaded)
        plgpu.copy_gmem_to_smem(source.gates.at[b, h, n], gates_s, loaded)
        plgpu.copy_gmem_to_smem(pair_rows_of(source.gates.at[b, h, n]), shared.pair_rows, loaded)
        if options.erase:
            plgpu.copy_gmem_to_smem(source.k.at[b, rows, key_head], load.k, loaded)
        plgpu.barrier_wait(loaded)
        decay = pair_decay(gates_s, shared.pair_rows, decay=options.decay, resets=options.resets)
        if options.erase:
            scores, lower = products([(load.q, w_s.T)], [(load.k, w_s.T)])
            lower = lower * decay
            scores = scores * (decay * options.scale)
            plgpu.commit_smem()  # q and k are dead: the inverse reuses their memory
            inverse = unit_lower_inverse(lower * row_scale(gates_s.at[BETA], lower), shared.phases.inverse)
            scores = times_inverse(scores, shared.phases.inverse)
            # Scale the rows of the inverse, which is float32 here, not those of w.
            until_end = inverse * row_scale(gates_s.at[TO_END], inverse) if options.gated else inverse
            plgpu.commit_smem()  # the inverse's operands are dead: the results reuse their memory
            split(until_end, store.inverse.at[0], store.inverse.at[1])
        else:
            scores = product(load.q, w_s.T) * (decay * options.scale)
            plgpu.commit_smem()
        store.scores[...] = scores.astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(store.scores, target.scores.at[b, h, n])
        if options.erase:
            (solved,) = products([(store.inverse.at[0].T, w_s), (store.inverse.at[1].T, w_s)])
            plgpu.commit_smem()  # the write keys are dead: their product reuses their memory
            w_s[...] = solved.astype(q.dtype)
            if invert:
                split(inverse, store.inverse.at[0], store.inverse.at[1])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(w_s, target.solved.at[b, rows, h])
        for half, ref in enumerate(target.inverse or []):
            plgpu.copy_smem_to_gmem(store.inverse.at[half], ref.at[b, h, n])
        plgpu.wait_smem_to_gmem(0)

    keys = smem(CHUNK, key_dim, dtype=q.dtype)
    results = launch(
        body,
        "delta_rule_prepare",
        inputs={"q": q, "k": k, "w": w, "gates": gates},
        out=out,
        scratch={
            "w": keys,
            # Sharing memory lets a multiprocessor of an H200 hold two blocks.
            "phases": Phases(
                load={"q": keys, "k": keys},
                inverse=INVERSE,
                store={
                    "scores": smem(CHUNK, CHUNK, dtype=q.dtype),
                    "inverse": smem(2, CHUNK, CHUNK, dtype=q.dtype),
                },
            ),
            "gates": plgpu.SMEM((GATES, CHUNK), jnp.float32),
            "pair_rows": pair_rows_tile(),
            "loaded": plgpu.Barrier(num_arrivals=4 + options.erase),
        },
        grid={"batch": batch, "chunk": count, "head": heads},
        interpret=options.interpret,
    )
    return Chunks(q, k, w, gates, None, results.scores, results.solved, results.inverse)
