"""The backward scan of the Gram preconditioner: the gradient of A from chunk to chunk, and all others inside."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.gates import FROM_START, GATES, TO_END, gate
from triton_kernels.common.launch import launch
from triton_kernels.gram.chunk import (
    CHUNK,
    EPSILON,
    GAIN,
    Chunks,
    GramOptions,
    constants_of,
    decay_before,
    multiplier_of,
    scalars_of,
    settings_of,
    sums_before,
)

# Rows of the sums over key channels, [SUMS, C] float32.
D_GAIN, D_LOG_DECAY, D_CENTER = range(3)
SUMS = 3


@triton.jit
def gram_scan_backward(
    k_ptr, gates_ptr, center_ptr, start_ptr, d_out_ptr, d_final_ptr, d_k_ptr, sums_ptr, d_initial_ptr, log_squash, N,
    P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, WRITE_KEY: tl.constexpr,
    RESETS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, GRADIENTS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Scan all chunks of BLOCK key channels of one head backward.

    GRADIENTS: store the gradients of the tokens, not only that of the initial A.
    """
    program = tl.program_id(0).to(tl.int64)  # (batch, block of channels, head)
    h = program % P
    block = program // P % (K // BLOCK)
    b = program // (P * (K // BLOCK))
    channel = (block * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    i = tl.arange(0, C)
    cell = i[:, None] * (P * K) + channel[None, :]
    center = tl.load(center_ptr + b * P + h)
    d_after = tl.load(d_final_ptr + (b * P + h) * K + channel)
    for reverse in tl.range(0, N, num_stages=STAGES):
        n = N - 1 - reverse
        chunk = (b * N + n) * P + h
        at = ((b * N + n) * (C * P) + h) * K
        gates = gates_ptr + chunk * (GATES * C)
        key = tl.load(k_ptr + at + cell).to(tl.float32)
        d_out = tl.load(d_out_ptr + at + cell).to(tl.float32)
        start = tl.load(start_ptr + chunk * K + channel)
        gain = gate(gates, GAIN, i, C)[:, None]
        from_start = gate(gates, FROM_START, i, C)[:, None]
        added = key * key * gain
        decay = decay_before(gates, C, RESETS)
        before = sums_before(decay, added, gates, start, C, PRECISION)
        r, multiplier = multiplier_of(before + added, center, log_squash)
        d_key = d_out * multiplier  # of the write key
        d_r = d_key * -log_squash / ((1.0 + tl.abs(r)) * (1.0 + tl.abs(r)))
        if WRITE_KEY:
            d_r *= key
        d_running = d_r / (before + added + EPSILON)
        if GRADIENTS:
            # The whole gradient of A at each token, which equals that of the term that the token adds.
            d_added = d_running + gate(gates, TO_END, i, C)[:, None] * d_after[None, :]
            d_added = tl.dot(tl.trans(decay), d_running, d_added, input_precision=PRECISION)
            sums = sums_ptr + ((chunk * (K // BLOCK) + block) * SUMS) * C + i
            tl.store(sums, tl.sum(key * key * d_added, axis=1))
            tl.store(sums + C, tl.sum(before * d_added, axis=1))
            tl.store(sums + 2 * C, -tl.sum(d_r, axis=1))
            d_k = 2.0 * key * gain * d_added
            if WRITE_KEY:
                d_k += d_key
            tl.store(d_k_ptr + at + cell, d_k.to(d_k_ptr.dtype.element_ty))
        d_after = tl.load(gates + FROM_START * C + C - 1) * d_after + tl.sum(from_start * d_running, axis=0)
    tl.store(d_initial_ptr + (b * P + h) * K + channel, d_after)


def scan_backward(
    chunks: Chunks,
    start: jax.Array,
    d_out: jax.Array,
    d_final: jax.Array,
    options: GramOptions,
    *,
    keep: Literal["gradients", "initial"],
) -> Any:
    """Run the scan; return a namespace of `d_initial_ptr`, the gradient of the initial A [B, P, K] float32, and more.

    Args:
        chunks: the inputs.
        start: A before each chunk [B, N, P, K] float32.
        d_out: gradient of the outputs [B, T, P, K].
        d_final: gradient of A after the last token [B, P, K] float32.
        options: static options.
        keep: with "gradients" also `d_k_ptr` [B, T, P, K], and `sums_ptr`, the gradients of gain, log decay and center
            by token and block of channels [B, N, P, blocks, SUMS, C] float32.
    """
    k = chunks.k
    batch, length, heads, key_dim = k.shape
    chosen = settings_of("gram_scan_backward", k, options)
    blocks = key_dim // chosen.block
    sums = jax.ShapeDtypeStruct((batch, length // CHUNK, heads, blocks, SUMS, CHUNK), jnp.float32)
    everything = keep == "gradients"
    return launch(
        gram_scan_backward,
        inputs={
            "k_ptr": k,
            "gates_ptr": chunks.gates,
            "center_ptr": chunks.center,
            "start_ptr": start,
            "d_out_ptr": d_out,
            "d_final_ptr": d_final,
        },
        outputs={
            "d_k_ptr": jax.ShapeDtypeStruct(k.shape, k.dtype) if everything else None,
            "sums_ptr": sums if everything else None,
            "d_initial_ptr": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        },
        scalars=scalars_of(k, options),
        constants=constants_of(k, options, chosen) | {"GRADIENTS": everything, "SUMS": SUMS},
        programs=heads * blocks,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
