"""The gradients of the arrays that a chunk reads, from the results of `scan_backward`, in parallel over all chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.hypergradient.chunk import (
    ANCHOR_WEIGHT,
    BETA,
    CHUNK,
    FORGET,
    RESET,
    STEP,
    WORDS,
    C,
    Chunks,
    HypergradientOptions,
    chunk_index,
    gate,
    number_and_heads,
    rows,
    tokens_at,
)
from triton_kernels.hypergradient.scan_backward import Cotangents
from triton_kernels.hypergradient.tokens import follow, kept_at, used

# Rows of the gradients of the gates of a chunk.
D_STEP = tl.constexpr(0)
D_BETA = tl.constexpr(1)
D_LOG_FORGET = tl.constexpr(2)


class Gradients(NamedTuple):
    """Results of `gradients`."""

    d_k: jax.Array  # [B, T, P, K] in the type of k
    d_gates: jax.Array  # of step, beta and, with forgetting, log_forget [B, P, N, 2 or 3, 64] float32
    d_anchor: jax.Array | None  # by chunk [B, P, N, K] float32


def gradients(chunks: Chunks, d_out: jax.Array, cotangents: Cotangents, options: HypergradientOptions) -> Gradients:
    """Return the gradients of k, of the gates and, if anchored, of the anchor.

    Args:
        chunks: of `scan`.
        d_out: cotangent of d, or with `options.return_write_key` of d k.
        cotangents: of `scan_backward`.
        options: of the kernel.
    """
    k = chunks.k
    batch, _, heads, size = k.shape
    leading = (batch, heads, chunks.number)
    chosen = options.settings("hypergradient_gradients", k)
    d_anchor = jax.ShapeDtypeStruct((*leading, size), jnp.float32)
    found = launch(
        hypergradient_gradients,
        inputs={
            "k_ptr": k,
            "gates_ptr": chunks.gates,
            "start_ptr": chunks.start,
            "feedback_ptr": chunks.feedback,
            "sequential_ptr": chunks.sequential,
            "kept_ptr": chunks.kept,
            "after_reset_ptr": chunks.after_reset,
            "anchor_ptr": chunks.anchor,
            "d_out_ptr": d_out,
            "d_feedback_ptr": cotangents.d_feedback,
            "d_after_ptr": cotangents.d_after,
        },
        outputs={
            "d_k_ptr": jax.ShapeDtypeStruct(k.shape, k.dtype),
            "d_gates_ptr": jax.ShapeDtypeStruct((*leading, 2 + options.forget, CHUNK), jnp.float32),
            "d_anchor_ptr": d_anchor if options.anchored else None,
            "states_ptr": jax.ShapeDtypeStruct((*leading, CHUNK // chosen.block, size), jnp.float32),
        },
        scalars=number_and_heads(k),
        constants=options.constants(k) | {"WRITE_KEY": options.return_write_key, "BLOCK": chosen.block},
        programs=heads * chunks.number,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
    return Gradients(found.d_k_ptr, found.d_gates_ptr, found.d_anchor_ptr if options.anchored else None)


@triton.jit
def hypergradient_gradients(
    k_ptr, gates_ptr, start_ptr, feedback_ptr, sequential_ptr, kept_ptr, after_reset_ptr, anchor_ptr,
    d_out_ptr, d_feedback_ptr, d_after_ptr, d_k_ptr, d_gates_ptr, d_anchor_ptr, states_ptr, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, FORGETS: tl.constexpr, ANCHORED: tl.constexpr, RESETS: tl.constexpr,
    BOUNDED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, WRITE_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tokens of one chunk and head, the last first.

    d is recomputed: first before every BLOCK tokens, in memory, then in each block before every token, in registers.
    """
    b, p, n = chunk_index(N, P)
    head = b * P + p
    chunk = head * N + n
    channel = tl.arange(0, K)
    k_ptr = tokens_at(k_ptr, b, p, n, N, P, K)
    d_out_ptr = tokens_at(d_out_ptr, b, p, n, N, P, K)
    d_k_ptr = tokens_at(d_k_ptr, b, p, n, N, P, K)
    gates_ptr += chunk * ROWS * C
    feedback_ptr += chunk * C
    d_feedback_ptr += chunk * C
    d_gates_ptr += chunk * (3 if FORGETS else 2) * C
    states_ptr += chunk * (C // BLOCK) * K
    after_reset = tl.load(after_reset_ptr + head * K + channel)
    anchor = tl.load(anchor_ptr + head * K + channel)
    if BOUNDED:
        everywhere = tl.load(sequential_ptr + chunk) == 0
        first_kept = tl.where(everywhere, -1, tl.load(kept_ptr + chunk * WORDS * K + channel))
        second_kept = tl.where(everywhere, -1, tl.load(kept_ptr + (chunk * WORDS + 1) * K + channel))
    d = tl.load(start_ptr + chunk * K + channel)
    for first in tl.range(0, C, BLOCK, loop_unroll_factor=1):
        tl.store(states_ptr + first // BLOCK * K + channel, d)
        keys = rows(k_ptr, first, P, K, BLOCK)
        for i in tl.static_range(BLOCK):
            d = used(d, gates_ptr, first + i, after_reset, RESETS)
            u = keys[i] * keys[i]
            d = follow(d, u, feedback_ptr, gates_ptr, first + i, anchor, FORGETS, ANCHORED, BOUNDED, LO, HI)
    tl.debug_barrier()  # the states are read back from memory
    cotangent = tl.load(d_after_ptr + chunk * K + channel)
    d_anchor = tl.zeros((K,), tl.float32)
    for done in tl.range(0, C, BLOCK, loop_unroll_factor=1):
        first = C - BLOCK - done
        d = tl.load(states_ptr + first // BLOCK * K + channel)
        keys = rows(k_ptr, first, P, K, BLOCK)
        d_outs = rows(d_out_ptr, first, P, K, BLOCK)
        states = ()
        for i in tl.static_range(BLOCK):
            d = used(d, gates_ptr, first + i, after_reset, RESETS)
            states = states + (d,)  # type: ignore[assignment]
            u = keys[i] * keys[i]
            d = follow(d, u, feedback_ptr, gates_ptr, first + i, anchor, FORGETS, ANCHORED, BOUNDED, LO, HI)
        for i in tl.static_range(BLOCK - 1, -1, -1):
            t = first + i
            key = keys[i]
            u = key * key
            d = states[i]
            g = d_outs[i]
            if BOUNDED:
                cotangent = kept_at(cotangent, first_kept, second_kept, t)
            feedback = tl.load(feedback_ptr + t)
            d_feedback = tl.load(d_feedback_ptr + t)
            beta_d_feedback = gate(gates_ptr, BETA, t) * d_feedback
            d_u = (gate(gates_ptr, STEP, t) * feedback) * cotangent - beta_d_feedback * d
            d_k = 2.0 * (key * d_u)
            if WRITE_KEY:
                d_k += g * d
                g = g * key
            tl.store(d_k_ptr + t * P * K + channel, d_k.to(d_k_ptr.dtype.element_ty))
            tl.store(d_gates_ptr + D_STEP * C + t, tl.sum(cotangent * u, axis=0) * feedback)
            tl.store(d_gates_ptr + D_BETA * C + t, -(d_feedback * tl.sum(d * u, axis=0)))
            if FORGETS:
                forget = gate(gates_ptr, FORGET, t)
                if ANCHORED:
                    d -= anchor
                    d_anchor += gate(gates_ptr, ANCHOR_WEIGHT, t) * cotangent
                tl.store(d_gates_ptr + D_LOG_FORGET * C + t, forget * tl.sum(cotangent * d, axis=0))
                cotangent *= forget
            cotangent += g - beta_d_feedback * u
            if RESETS:
                cotangent = tl.where(gate(gates_ptr, RESET, t) > 0.0, 0.0, cotangent)
    if ANCHORED:
        tl.store(d_anchor_ptr + chunk * K + channel, d_anchor)
