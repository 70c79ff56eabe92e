"""The forward scan: the state from chunk to chunk, in registers. One program per head and block of values."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.common.settings import Settings, settings
from triton_kernels.common.target import Target
from triton_kernels.common.tiles import bits_of
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions, constants_of, halves_of
from triton_kernels.delta_rule.tiles import BETA, FROM_START, GATES, TO_END, gate, rows_at, store_halves


@triton.jit
def delta_rule_scan(
    q_ptr, k_ptr, w_ptr, v_ptr, gates_ptr, scores_ptr, carry_ptr, initial_ptr,
    out_ptr, final_ptr, states_ptr, residual_ptr, scale, N,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr, CHANNEL: tl.constexpr, OUTPUTS: tl.constexpr,
    STATES: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Scan all chunks of BLOCK value channels of one head.

    OUTPUTS: store the outputs. STATES: store the state before each chunk and the residual of each token.
    """
    program = tl.program_id(0).to(tl.int64)  # (batch, block of values, head)
    h = program % H
    b = program // (H * (V // BLOCK))
    value = program // H % (V // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, K)
    i = tl.arange(0, C)
    key_head = h // (H // HK)
    write_head = h // (H // HW)
    cell = key[:, None] * V + value[None, :]
    state = tl.load(initial_ptr + (b * H + h) * K * V + cell)
    for n in tl.range(0, N):
        row = (b * N + n) * C + i
        chunk = (b * N + n) * H + h
        gates = gates_ptr + chunk * GATES * C
        v = tl.load(v_ptr + rows_at(row, h, value, H, V))
        w = tl.load(w_ptr + rows_at(row, write_head, key, HW, K))
        rounded = state.to(w.dtype)
        if STATES:
            tl.store(states_ptr + chunk * K * V + cell, rounded)
        residual = v.to(tl.float32)
        if ERASE:
            k = tl.load(k_ptr + rows_at(row, key_head, key, HK, K))
            recalled = tl.dot(k, rounded, input_precision=PRECISION)
            if GATED:
                recalled *= gate(gates, FROM_START, i, C)[:, None]
            residual -= recalled
        residual *= gate(gates, BETA, i, C)[:, None]
        written = residual.to(w.dtype)
        if STATES:
            at = ((row[:, None] * HALVES) * H + h) * V + value[None, :]
            store_halves(residual_ptr, at, H * V, residual, HALVES)
        if OUTPUTS:
            q = tl.load(q_ptr + rows_at(row, key_head, key, HK, K))
            scores = tl.load(scores_ptr + chunk * C * C + i[:, None] * C + i[None, :])
            out = tl.dot(q, rounded, input_precision=PRECISION) * scale
            if GATED:
                out *= gate(gates, FROM_START, i, C)[:, None]
            out = tl.dot(scores, written, out, input_precision=PRECISION)
            tl.store(out_ptr + rows_at(row, h, value, H, V), out.to(out_ptr.dtype.element_ty))
        if GATED and not ERASE:  # with erase the decay to the end of the chunk is already in the write keys
            written = (residual * gate(gates, TO_END, i, C)[:, None]).to(w.dtype)
        if CHANNEL:
            state *= tl.load(carry_ptr + chunk * K + key)[:, None]
        elif GATED:
            state *= tl.load(gates + FROM_START * C + C - 1)
        state = tl.dot(tl.trans(w), written, state, input_precision=PRECISION)
    tl.store(final_ptr + (b * H + h) * K * V + cell, state)


def scan_settings(name: str, target: Target, dtype: jnp.dtype, key_dim: int, value_dim: int) -> Settings:
    """Return the settings of a scan, whose block is at most all values."""
    chosen = settings(name, target, bits_of(dtype), key_dim)
    return chosen._replace(block=min(chosen.block, value_dim))


def scan(
    chunks: Chunks,
    v: jax.Array,
    initial: jax.Array,
    options: DeltaRuleOptions,
    *,
    keep: Literal["outputs", "states", "final"],
) -> Any:
    """Run the scan and return a namespace of the results that `keep` names.

    Args:
        chunks: of `prepare`.
        v: [B, T, H, V].
        initial: initial state [B, H, K, V] float32.
        options: static options.
        keep: the results to store.

            "outputs": `out_ptr` [B, T, H, V] and `final_ptr`, the final state [B, H, K, V] float32.
            "final": `final_ptr` alone.
            "states", for the gradient: `states_ptr`, the state before each chunk [B, N, H, K, V]; `residual_ptr`,
            beta (V - K S) in halves [B, T, halves, H, V].
    """
    batch, length, heads, value_dim = v.shape
    key_dim, dtype = chunks.q.shape[3], v.dtype
    count = length // options.chunk
    chosen = scan_settings("delta_rule_scan", options.target, dtype, key_dim, value_dim)
    states = jax.ShapeDtypeStruct((batch, count, heads, key_dim, value_dim), dtype)
    residual = jax.ShapeDtypeStruct((batch, length, halves_of(dtype), heads, value_dim), dtype)
    return launch(
        delta_rule_scan,
        inputs={
            "q_ptr": chunks.q,
            "k_ptr": chunks.k,
            "w_ptr": chunks.written_key,
            "v_ptr": v,
            "gates_ptr": chunks.gates,
            "scores_ptr": chunks.scores,
            "carry_ptr": chunks.carry,
            "initial_ptr": initial,
        },
        outputs={
            "out_ptr": jax.ShapeDtypeStruct(v.shape, dtype) if keep == "outputs" else None,
            "final_ptr": jax.ShapeDtypeStruct(initial.shape, jnp.float32),
            "states_ptr": states if keep == "states" else None,
            "residual_ptr": residual if keep == "states" else None,
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
            "OUTPUTS": keep == "outputs",
            "STATES": keep == "states",
        },
        programs=heads * (value_dim // chosen.block),
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
