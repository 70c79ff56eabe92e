"""The backward scan: the gradient of the state from the last chunk to the first, in registers."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.gates import BETA, FROM_START, GATES, TO_END, gate
from triton_kernels.common.launch import launch
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions, constants_of, halves_of
from triton_kernels.delta_rule.scan import load_state, scan_settings, store_state
from triton_kernels.delta_rule.tiles import halves_at, low, rows_at, store_halves


@triton.jit
def delta_rule_scan_backward(
    q_ptr, k_ptr, w_ptr, d_out_ptr, gates_ptr, scores_ptr, carry_ptr, d_final_ptr,
    d_v_ptr, z_ptr, d_states_ptr, d_initial_ptr, scale, N,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, SLAB: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr, CHANNEL: tl.constexpr,
    PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Scan all chunks of BLOCK value channels of one head in reverse."""
    program = tl.program_id(0).to(tl.int64)  # (batch, block of values, head)
    h = program % H
    b = program // (H * (V // BLOCK))
    value = (program // H % (V // BLOCK) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    i = tl.arange(0, C)
    key_head = h // (H // HK)
    write_head = h // (H // HW)
    d_state = load_state(d_final_ptr + (b * H + h) * K * V, value, K, V, SLAB)
    for later in tl.range(0, N):
        n = N - 1 - later
        token = (b * N + n) * C
        chunk = (b * N + n) * H + h
        gates = gates_ptr + chunk * GATES * C
        z = tl.zeros((C, BLOCK), tl.float32)
        for slab in tl.static_range(K // SLAB):
            key = slab * SLAB + tl.arange(0, SLAB)
            cell = d_states_ptr + chunk * HALVES * K * V + (key[:, None] * V + value[None, :])
            store_halves(cell, K * V, d_state[slab], HALVES)
            w = tl.load(rows_at(w_ptr, token, write_head, i, key, HW, K))
            high = d_state[slab].to(w.dtype)
            z = tl.dot(w, high, z, input_precision=PRECISION)
            if HALVES == 2:
                z = tl.dot(w, low(d_state[slab], high), z, input_precision=PRECISION)
        if GATED and not ERASE:  # with erase the decay to the end of the chunk is already in the write keys
            z *= gate(gates, TO_END, i, C)[:, None]
        d_out = tl.load(rows_at(d_out_ptr, token, h, i, value, H, V))
        scores = tl.load(scores_ptr + chunk * C * C + i[:, None] * C + i[None, :])
        z = tl.dot(tl.trans(scores), d_out, z, input_precision=PRECISION)
        store_halves(halves_at(z_ptr, token, h, i, value, H, V, HALVES), H * V, z, HALVES)
        d_v = z * gate(gates, BETA, i, C)[:, None]
        tl.store(rows_at(d_v_ptr, token, h, i, value, H, V), d_v.to(d_out.dtype))
        d_read = d_out.to(tl.float32) * scale
        if GATED:
            from_start = gate(gates, FROM_START, i, C)[:, None]
            d_read *= from_start
            d_v *= from_start
        d_read = d_read.to(d_out.dtype)
        d_recalled = (-d_v).to(d_out.dtype)
        before = ()
        for slab in tl.static_range(K // SLAB):
            key = slab * SLAB + tl.arange(0, SLAB)
            kept = d_state[slab]
            if CHANNEL:
                kept *= tl.load(carry_ptr + chunk * K + key)[:, None]
            elif GATED:
                kept *= tl.load(gates + FROM_START * C + C - 1)
            q = tl.load(rows_at(q_ptr, token, key_head, i, key, HK, K))
            kept = tl.dot(tl.trans(q), d_read, kept, input_precision=PRECISION)
            if ERASE:
                k = tl.load(rows_at(k_ptr, token, key_head, i, key, HK, K))
                kept = tl.dot(tl.trans(k), d_recalled, kept, input_precision=PRECISION)
            before = before + (kept,)  # type: ignore[assignment]
        d_state = before
    store_state(d_initial_ptr + (b * H + h) * K * V, value, d_state, K, V, SLAB)


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
        constants=constants_of(chunks.q, heads, options)
        | {
            "HW": chunks.written_key.shape[2],
            "V": value_dim,
            "BLOCK": chosen.block,
            "SLAB": chosen.slab,
            "ERASE": options.erase,
            "GATED": options.gated,
            "CHANNEL": chunks.carry is not None,
        },
        programs=heads * (value_dim // chosen.block),
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
