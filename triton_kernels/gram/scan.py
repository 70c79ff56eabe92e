"""The forward scan of the Gram preconditioner: one program per head and block of key channels, with A in registers."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.gates import FROM_START, GATES, TO_END, gate
from triton_kernels.common.launch import launch
from triton_kernels.gram.chunk import (
    CHUNK,
    GAIN,
    Chunks,
    GramOptions,
    constants_of,
    decay_before,
    multiplier_of,
    out_type,
    scalars_of,
    settings_of,
    sums_before,
)


@triton.jit
def gram_scan(
    k_ptr, gates_ptr, center_ptr, initial_ptr, out_ptr, final_ptr, start_ptr, log_squash, N,
    P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, WRITE_KEY: tl.constexpr,
    RESETS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, OUTPUTS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """Scan all chunks of BLOCK key channels of one head.

    OUTPUTS: store multipliers or write keys. STATES: store A before each chunk.
    """
    program = tl.program_id(0).to(tl.int64)  # (batch, block of channels, head)
    h = program % P
    b = program // (P * (K // BLOCK))
    channel = (program // P % (K // BLOCK) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    i = tl.arange(0, C)
    cell = i[:, None] * (P * K) + channel[None, :]
    center = tl.load(center_ptr + b * P + h)
    start = tl.load(initial_ptr + (b * P + h) * K + channel)
    for n in tl.range(0, N, num_stages=STAGES):
        chunk = (b * N + n) * P + h
        at = ((b * N + n) * (C * P) + h) * K
        gates = gates_ptr + chunk * (GATES * C)
        key = tl.load(k_ptr + at + cell).to(tl.float32)
        added = key * key * gate(gates, GAIN, i, C)[:, None]
        if STATES:
            tl.store(start_ptr + chunk * K + channel, start)
        if OUTPUTS:
            before = sums_before(decay_before(gates, C, RESETS), added, gates, start, C, PRECISION)
            _, out = multiplier_of(before + added, center, log_squash)
            if WRITE_KEY:
                out *= key
            tl.store(out_ptr + at + cell, out.to(out_ptr.dtype.element_ty))
        to_end = gate(gates, TO_END, i, C)[:, None] * added
        start = tl.load(gates + FROM_START * C + C - 1) * start + tl.sum(to_end, axis=0)
    tl.store(final_ptr + (b * P + h) * K + channel, start)


def scan(
    chunks: Chunks, initial: jax.Array, options: GramOptions, *, keep: Literal["outputs", "outputs, states", "final"]
) -> Any:
    """Run the scan and return a namespace of `final_ptr`, A after the last token [B, P, K] float32, and more.

    Args:
        chunks: the inputs.
        initial: A before the first token [B, P, K] float32.
        options: static options.
        keep: what else to store: `out_ptr`, multipliers or write keys [B, T, P, K], and `start_ptr`, A before each
            chunk [B, N, P, K] float32.
    """
    k = chunks.k
    batch, length, heads, key_dim = k.shape
    chosen = settings_of("gram_scan", k, options)
    states = jax.ShapeDtypeStruct((batch, length // CHUNK, heads, key_dim), jnp.float32)
    return launch(
        gram_scan,
        inputs={"k_ptr": k, "gates_ptr": chunks.gates, "center_ptr": chunks.center, "initial_ptr": initial},
        outputs={
            "out_ptr": jax.ShapeDtypeStruct(k.shape, out_type(k, options)) if "outputs" in keep else None,
            "final_ptr": jax.ShapeDtypeStruct(initial.shape, jnp.float32),
            "start_ptr": states if "states" in keep else None,
        },
        scalars=scalars_of(k, options),
        constants=constants_of(k, options, chosen) | {"OUTPUTS": "outputs" in keep, "STATES": "states" in keep},
        programs=heads * (key_dim // chosen.block),
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
