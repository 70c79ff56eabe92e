"""d before every token, or its write key, from d before each chunk and the feedback, in parallel over all chunks."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.hypergradient.chunk import (
    C,
    Chunks,
    HypergradientOptions,
    chunk_index,
    number_and_heads,
    rows,
    tokens_at,
)
from triton_kernels.hypergradient.tokens import follow, used


def expand(chunks: Chunks, options: HypergradientOptions) -> jax.Array:
    """Return d before every token [B, T, P, K] float32, or the write keys d k in the type of k.

    Args:
        chunks: of `scan`.
        options: of the kernel.
    """
    k = chunks.k
    chosen = options.settings("hypergradient_expand", k)
    return launch(
        hypergradient_expand,
        inputs={
            "k_ptr": k,
            "gates_ptr": chunks.gates,
            "start_ptr": chunks.start,
            "feedback_ptr": chunks.feedback,
            "after_reset_ptr": chunks.after_reset,
            "anchor_ptr": chunks.anchor,
        },
        outputs={"out_ptr": jax.ShapeDtypeStruct(k.shape, k.dtype if options.return_write_key else jnp.float32)},
        scalars=number_and_heads(k),
        constants=options.constants(k) | {"WRITE_KEY": options.return_write_key, "BLOCK": chosen.block},
        programs=k.shape[2] * chunks.number,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    ).out_ptr


@triton.jit
def hypergradient_expand(
    k_ptr, gates_ptr, start_ptr, feedback_ptr, after_reset_ptr, anchor_ptr, out_ptr, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, FORGETS: tl.constexpr, ANCHORED: tl.constexpr, RESETS: tl.constexpr,
    BOUNDED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, WRITE_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tokens of one chunk and head, with d in registers; BLOCK tokens are loaded at once.

    Values that `scan` found within the bounds are projected like all others: its sums may round otherwise.
    """
    b, p, n = chunk_index(N, P)
    chunk = (b * P + p) * N + n
    channel = tl.arange(0, K)
    k_ptr = tokens_at(k_ptr, b, p, n, N, P, K)
    out_ptr = tokens_at(out_ptr, b, p, n, N, P, K)
    gates_ptr += chunk * ROWS * C
    feedback_ptr += chunk * C
    d = tl.load(start_ptr + chunk * K + channel)
    after_reset = tl.load(after_reset_ptr + (b * P + p) * K + channel)
    anchor = tl.load(anchor_ptr + (b * P + p) * K + channel)
    for first in tl.range(0, C, BLOCK, loop_unroll_factor=1):
        keys = rows(k_ptr, first, P, K, BLOCK)
        for i in tl.static_range(BLOCK):
            t = first + i
            d = used(d, gates_ptr, t, after_reset, RESETS)
            out = d
            if WRITE_KEY:
                out = d * keys[i]
            tl.store(out_ptr + t * P * K + channel, out.to(out_ptr.dtype.element_ty))
            d = follow(d, keys[i] * keys[i], feedback_ptr, gates_ptr, t, anchor, FORGETS, ANCHORED, BOUNDED, LO, HI)
