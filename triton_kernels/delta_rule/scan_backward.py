"""The backward scan: the gradient of the state from the last chunk to the first, in registers."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions, constants_of, halves_of
from triton_kernels.delta_rule.scan import scan_settings
from triton_kernels.delta_rule.tiles import BETA, FROM_START, GATES, TO_END, gate, low, rows_at, store_halves


@triton.jit
def delta_rule_scan_backward(
    q_ptr, k_ptr, w_ptr, d_out_ptr, gates_ptr, scores_ptr, carry_ptr, d_final_ptr,
    d_v_ptr, z_ptr, d_states_ptr, d_initial_ptr, scale, N,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Scan all chunks of BLOCK value channels of one head in reverse."""
    program = tl.program_id(0).to(tl.int64)  # (batch, block of values, head)
    h = program % H
    b = program // (H * (V // BLOCK))
    value = program // H % (V // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, K)
    i = tl.arange(0, C)
    key_head = h // (H // HK)
    write_head = h // (H // HW)
    cell = key[:, None] * V + value[None, :]
    d_state = tl.load(d_final_ptr + (b * H + h) * K * V + cell)
    for later in tl.range(0, N):
        n = N - 1 - later
        row = (b * N + n) * C + i
        chunk = (b * N + n) * H + h
        gates = gates_ptr + chunk * GATES * C
        d_out = tl.load(d_out_ptr + rows_at(row, h, value, H, V))
        w = tl.load(w_ptr + rows_at(row, write_head, key, HW, K))
        scores = tl.load(scores_ptr + chunk * C * C + i[:, None] * C + i[None, :])
        store_halves(d_states_ptr, chunk * HALVES * K * V + cell, K * V, d_state, HALVES)
        high = d_state.to(w.dtype)
        z = tl.dot(w, high, input_precision=PRECISION)
        if HALVES == 2:
            z = tl.dot(w, low(d_state, high), z, input_precision=PRECISION)
        if GATED and not ERASE:  # with erase the decay to the end of the chunk is already in the write keys
            z *= gate(gates, TO_END, i, C)[:, None]
        z = tl.dot(tl.trans(scores), d_out, z, input_precision=PRECISION)
        store_halves(z_ptr, ((row[:, None] * HALVES) * H + h) * V + value[None, :], H * V, z, HALVES)
        d_v = z * gate(gates, BETA, i, C)[:, None]
        tl.store(d_v_ptr + rows_at(row, h, value, H, V), d_v.to(d_v_ptr.dtype.element_ty))
        d_read = d_out.to(tl.float32) * scale
        if GATED:
            from_start = gate(gates, FROM_START, i, C)[:, None]
            d_read *= from_start
            d_v *= from_start
        if CHANNEL:
            d_state *= tl.load(carry_ptr + chunk * K + key)[:, None]
        elif GATED:
            d_state *= tl.load(gates + FROM_START * C + C - 1)
        q = tl.load(q_ptr + rows_at(row, key_head, key, HK, K))
        d_state = tl.dot(tl.trans(q), d_read.to(w.dtype), d_state, input_precision=PRECISION)
        if ERASE:
            k = tl.load(k_ptr + rows_at(row, key_head, key, HK, K))
            d_state = tl.dot(tl.trans(k), (-d_v).to(w.dtype), d_state, input_precision=PRECISION)
    tl.store(d_initial_ptr + (b * H + h) * K * V + cell, d_state)


def scan_backward(chunks: Chunks, d_out: jax.Array, d_final: jax.Array, options: DeltaRuleOptions) -> Any:
    """Run the scan of the gradient and return a namespace.

    `d_v_ptr` [B, T, H, V] in the type of v; `z_ptr`, Z = (I + A)^-T dR, the gradient of beta (V - K S), in halves
    [B, T, halves, H, V]; `d_states_ptr`, that of the state after each chunk, in halves [B, N, H, halves, K, V];
    `d_initial_ptr`, that of the initial state [B, H, K, V] float32.

    Args:
        chunks: of `prepare`, for a gradient.
        d_out: gradient of the outputs [B, T, H, V].
        d_final: gradient of the final state [B, H, K, V] float32.
        options: static options.
    """
    batch, length, heads, value_dim = d_out.shape
    key_dim, dtype, halves = chunks.q.shape[3], d_out.dtype, halves_of(d_out.dtype)
    count = length // options.chunk
    chosen = scan_settings("delta_rule_scan_backward", options.target, dtype, key_dim, value_dim)
    return launch(
        delta_rule_scan_backward,
        inputs={
            "q_ptr": chunks.q,
            "k_ptr": chunks.k,
            "w_ptr": chunks.written_key,
            "d_out_ptr": d_out,
            "gates_ptr": chunks.gates,
            "scores_ptr": chunks.scores,
            "carry_ptr": chunks.carry,
            "d_final_ptr": d_final,
        },
        outputs={
            "d_v_ptr": jax.ShapeDtypeStruct(d_out.shape, dtype),
            "z_ptr": jax.ShapeDtypeStruct((batch, length, halves, heads, value_dim), dtype),
            "d_states_ptr": jax.ShapeDtypeStruct((batch, count, heads, halves, key_dim, value_dim), dtype),
            "d_initial_ptr": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        },
        scalars={"scale": options.scale, "N": count},
        constants=constants_of(chunks, heads, options)
        | {
            "HW": chunks.written_key.shape[2],
            "V": value_dim,
            "BLOCK": chosen.block,
            "ERASE": options.erase,
            "GATED": options.gated,
            "CHANNEL": chunks.carry is not None,
        },
        programs=heads * (value_dim // chosen.block),
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
