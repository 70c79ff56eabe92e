"""The forward scan: the state from chunk to chunk, in registers. One program per head and block of values."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.gates import BETA, FROM_START, GATES, TO_END, gate
from triton_kernels.common.launch import launch
from triton_kernels.common.settings import Settings, settings
from triton_kernels.common.target import Target
from triton_kernels.common.tiles import bits_of
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions, constants_of, halves_of
from triton_kernels.delta_rule.tiles import halves_at, rows_at, store_halves


@triton.jit
def load_state(ptr, value, K: tl.constexpr, V: tl.constexpr, SLAB: tl.constexpr):
    """Return the columns `value` of a state [K, V] as a tuple of slabs [SLAB, values]."""
    state = ()
    for slab in tl.static_range(K // SLAB):
        key = slab * SLAB + tl.arange(0, SLAB)
        state = state + (tl.load(ptr + key[:, None] * V + value[None, :]),)  # type: ignore[assignment]
    return state


@triton.jit
def store_state(ptr, value, state, K: tl.constexpr, V: tl.constexpr, SLAB: tl.constexpr):
    """Store the slabs of a state, in the type of ptr."""
    for slab in tl.static_range(K // SLAB):
        key = slab * SLAB + tl.arange(0, SLAB)
        tl.store(ptr + key[:, None] * V + value[None, :], state[slab].to(ptr.dtype.element_ty))


@triton.jit
def delta_rule_scan(
    q_ptr, k_ptr, w_ptr, v_ptr, gates_ptr, scores_ptr, carry_ptr, initial_ptr,
    out_ptr, final_ptr, states_ptr, residual_ptr, scale, N,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, SLAB: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr, CHANNEL: tl.constexpr,
    OUTPUTS: tl.constexpr, STATES: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Scan all chunks of BLOCK value channels of one head.

    OUTPUTS: store the outputs. STATES: store the state before each chunk and the residual of each token.
    """
    program = tl.program_id(0).to(tl.int64)  # (batch, block of values, head)
    h = program % H
    b = program // (H * (V // BLOCK))
    value = (program // H % (V // BLOCK) * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    i = tl.arange(0, C)
    key_head = h // (H // HK)
    write_head = h // (H // HW)
    state = load_state(initial_ptr + (b * H + h) * K * V, value, K, V, SLAB)
    for n in tl.range(0, N):
        token = (b * N + n) * C
        chunk = (b * N + n) * H + h
        gates = gates_ptr + chunk * GATES * C
        if STATES:
            store_state(states_ptr + chunk * K * V, value, state, K, V, SLAB)
        recalled = tl.zeros((C, BLOCK), tl.float32)
        out = tl.zeros((C, BLOCK), tl.float32)
        for slab in tl.static_range(K // SLAB):
            key = slab * SLAB + tl.arange(0, SLAB)
            rounded = state[slab].to(v_ptr.dtype.element_ty)
            if ERASE:
                k = tl.load(rows_at(k_ptr, token, key_head, i, key, HK, K))
                recalled = tl.dot(k, rounded, recalled, input_precision=PRECISION)
            if OUTPUTS:
                q = tl.load(rows_at(q_ptr, token, key_head, i, key, HK, K))
                out = tl.dot(q, rounded, out, input_precision=PRECISION)
        v = tl.load(rows_at(v_ptr, token, h, i, value, H, V))
        residual = v.to(tl.float32)
        if ERASE:
            if GATED:
                recalled *= gate(gates, FROM_START, i, C)[:, None]
            residual -= recalled
        residual *= gate(gates, BETA, i, C)[:, None]
        written = residual.to(v.dtype)
        if STATES:
            store_halves(halves_at(residual_ptr, token, h, i, value, H, V, HALVES), H * V, residual, HALVES)
        if OUTPUTS:
            out *= scale
            if GATED:
                out *= gate(gates, FROM_START, i, C)[:, None]
            scores = tl.load(scores_ptr + chunk * C * C + i[:, None] * C + i[None, :])
            out = tl.dot(scores, written, out, input_precision=PRECISION)
            tl.store(rows_at(out_ptr, token, h, i, value, H, V), out.to(v.dtype))
        if GATED and not ERASE:  # with erase the decay to the end of the chunk is already in the write keys
            written = (residual * gate(gates, TO_END, i, C)[:, None]).to(v.dtype)
        after = ()
        for slab in tl.static_range(K // SLAB):
            key = slab * SLAB + tl.arange(0, SLAB)
            kept = state[slab]
            if CHANNEL:
                kept *= tl.load(carry_ptr + chunk * K + key)[:, None]
            elif GATED:
                kept *= tl.load(gates + FROM_START * C + C - 1)
            w = tl.load(rows_at(w_ptr, token, write_head, i, key, HW, K))
            after = after + (tl.dot(tl.trans(w), written, kept, input_precision=PRECISION),)  # type: ignore[assignment]
        state = after
    store_state(final_ptr + (b * H + h) * K * V, value, state, K, V, SLAB)


def scan_settings(name: str, target: Target, dtype: jnp.dtype, key_dim: int, value_dim: int) -> Settings:
    """Return the settings of a scan, whose block is at most all values and whose slab is at most all keys."""
    chosen = settings(name, target, bits_of(dtype), key_dim)
    return chosen._replace(block=min(chosen.block, value_dim), slab=min(chosen.slab, key_dim))


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
        constants=constants_of(chunks.q, heads, options)
        | {
            "HW": chunks.written_key.shape[2],
            "V": value_dim,
            "BLOCK": chosen.block,
            "SLAB": chosen.slab,
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
