"""Gradients of q, k, w and of the decays of a chunk. Parallel over chunks, heads and blocks of key channels."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.gates import BETA, FROM_START, GATES, TO_END, gate
from triton_kernels.common.launch import launch
from triton_kernels.common.settings import settings
from triton_kernels.common.tiles import bits_of
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions, constants_of
from triton_kernels.delta_rule.tiles import halves_at, rows_at


@triton.jit
def delta_rule_keys(
    q_ptr, k_ptr, w_ptr, d_out_ptr, written_ptr, z_ptr, gates_ptr, states_ptr, d_states_ptr, d_pairs_ptr,
    d_q_ptr, d_k_ptr, d_w_ptr, sums_ptr, d_carry_ptr, scale,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, ERASE: tl.constexpr, GATED: tl.constexpr, DECAYED: tl.constexpr,
    PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Sum over the values of one chunk of one head for BLOCK key channels.

    DECAYED: q, k and w are decayed per channel; the terms of pairs in the same chunk follow in another kernel.
    """
    program = tl.program_id(0).to(tl.int64)  # (batch, chunk, block of channels, head)
    h = program % H
    block = (program // H % (K // BLOCK)).to(tl.int32)
    chunk = program // (H * (K // BLOCK)) * H + h
    channel = block * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, C)
    token = chunk // H * C
    gates = gates_ptr + chunk * GATES * C
    d_q = tl.zeros((C, BLOCK), tl.float32)
    d_k = tl.zeros((C, BLOCK), tl.float32)
    d_w = tl.zeros((C, BLOCK), tl.float32)
    d_carry = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK_V, loop_unroll_factor=1):
        value = start + tl.arange(0, BLOCK_V)
        cell = channel[:, None] * V + value[None, :]
        state = tl.load(states_ptr + chunk * K * V + cell)
        d_state = tl.load(d_states_ptr + chunk * HALVES * K * V + cell)
        d_exact = d_state.to(tl.float32)
        d_out = tl.load(rows_at(d_out_ptr, token, h, i, value, H, V))
        written = tl.load(halves_at(written_ptr, token, h, i, value, H, V, HALVES))
        d_q = tl.dot(d_out, tl.trans(state), d_q, input_precision=PRECISION)
        if ERASE:
            z = tl.load(halves_at(z_ptr, token, h, i, value, H, V, HALVES))
            d_k = tl.dot(z, tl.trans(state), d_k, input_precision=PRECISION)
        d_w = tl.dot(written, tl.trans(d_state), d_w, input_precision=PRECISION)
        if HALVES == 2:
            d_rest = tl.load(d_states_ptr + (chunk * HALVES + 1) * K * V + cell)
            d_exact += d_rest.to(tl.float32)
            d_w = tl.dot(written, tl.trans(d_rest), d_w, input_precision=PRECISION)
            rest = tl.load(halves_at(written_ptr, token, h, i, value, H, V, HALVES) + H * V)
            d_w = tl.dot(rest, tl.trans(d_state), d_w, input_precision=PRECISION)
            if ERASE:
                z_rest = tl.load(halves_at(z_ptr, token, h, i, value, H, V, HALVES) + H * V)
                d_k = tl.dot(z_rest, tl.trans(state), d_k, input_precision=PRECISION)
        d_carry += tl.sum(state.to(tl.float32) * d_exact, axis=1)
    tl.store(d_carry_ptr + chunk * K + channel, d_carry)

    d_q *= scale
    if ERASE:
        d_k *= -gate(gates, BETA, i, C)[:, None]
    if GATED:
        d_q *= gate(gates, FROM_START, i, C)[:, None]
        d_w *= gate(gates, TO_END, i, C)[:, None]
        if ERASE:
            d_k *= gate(gates, FROM_START, i, C)[:, None]
    if not DECAYED:
        square = i[:, None] * C + i[None, :]
        d_pairs_ptr += chunk * 2 * HALVES * C * C
        w = tl.load(rows_at(w_ptr, token, h // (H // HW), i, channel, HW, K))
        q = tl.load(rows_at(q_ptr, token, h // (H // HK), i, channel, HK, K))
        end = tl.sum(w.to(tl.float32) * d_w, axis=1)  # of the terms that reach later chunks
        for half in tl.static_range(HALVES):
            d_scores = tl.load(d_pairs_ptr + half * C * C + square)
            d_q = tl.dot(d_scores, w, d_q, input_precision=PRECISION)
            d_w = tl.dot(tl.trans(d_scores), q, d_w, input_precision=PRECISION)
        cumulative = tl.sum(q.to(tl.float32) * d_q, axis=1)
        if ERASE:
            k = tl.load(rows_at(k_ptr, token, h // (H // HK), i, channel, HK, K))
            for half in tl.static_range(HALVES):
                d_lower = tl.load(d_pairs_ptr + (HALVES + half) * C * C + square)
                d_k = tl.dot(d_lower, w, d_k, input_precision=PRECISION)
                d_w = tl.dot(tl.trans(d_lower), k, d_w, input_precision=PRECISION)
            cumulative += tl.sum(k.to(tl.float32) * d_k, axis=1)
        cumulative -= tl.sum(w.to(tl.float32) * d_w, axis=1)
        sums_ptr += (chunk * (K // BLOCK) + block) * 2 * C
        tl.store(sums_ptr + i, cumulative)
        tl.store(sums_ptr + C + i, end)
    tl.store(rows_at(d_q_ptr, token, h, i, channel, H, K), d_q.to(d_q_ptr.dtype.element_ty))
    tl.store(rows_at(d_w_ptr, token, h, i, channel, H, K), d_w.to(d_w_ptr.dtype.element_ty))
    if ERASE:
        tl.store(rows_at(d_k_ptr, token, h, i, channel, H, K), d_k.to(d_k_ptr.dtype.element_ty))


def keys(
    chunks: Chunks, d_out: jax.Array, from_pairs: Any, forward: Any, backward: Any, options: DeltaRuleOptions
) -> Any:
    """Return a namespace of the gradients of a chunk's keys and decays.

    `d_q_ptr`, `d_k_ptr` (with erase) and `d_w_ptr` by value head [B, T, H, K], in the type of q, or float32 if value
    heads share a key head; under a decay per channel those of the decayed q, k and w, without the terms from the same
    chunk. `sums_ptr` [B, N, H, K / block, 2, C] float32: sums over channels of <q, dq> + <k, dk> - <w, dw>, and of the
    terms of <w, dw> that reach later chunks. `d_carry_ptr`: sums of S dS over values [B, N, H, K] float32.

    Args:
        chunks: of `prepare`, for a gradient.
        d_out: gradient of the outputs [B, T, H, V].
        from_pairs: of `pairs`.
        forward: of `scan`, with the states.
        backward: of `scan_backward`.
        options: static options.
    """
    batch, length, heads, value_dim = d_out.shape
    key_dim, dtype, chunk = chunks.q.shape[3], d_out.dtype, options.chunk
    by_chunk = (batch, length // chunk, heads)
    chosen = settings("delta_rule_keys", options.target, bits_of(dtype), key_dim)
    block = min(chosen.block, key_dim)
    ungrouped = heads == chunks.q.shape[2] == chunks.w.shape[2]
    d_key = jax.ShapeDtypeStruct((batch, length, heads, key_dim), dtype if ungrouped else jnp.float32)
    decayed = chunks.carry is not None
    sums = jax.ShapeDtypeStruct((*by_chunk, key_dim // block, 2, chunk), jnp.float32)
    return launch(
        delta_rule_keys,
        inputs={
            "q_ptr": chunks.q,
            "k_ptr": chunks.k,
            "w_ptr": chunks.w,
            "d_out_ptr": d_out,
            "written_ptr": from_pairs.written_ptr,
            "z_ptr": backward.z_ptr,
            "gates_ptr": chunks.gates,
            "states_ptr": forward.states_ptr,
            "d_states_ptr": backward.d_states_ptr,
            "d_pairs_ptr": from_pairs.d_pairs_ptr,
        },
        outputs={
            "d_q_ptr": d_key,
            "d_k_ptr": d_key if options.erase else None,
            "d_w_ptr": d_key,
            "sums_ptr": None if decayed else sums,
            "d_carry_ptr": jax.ShapeDtypeStruct((*by_chunk, key_dim), jnp.float32),
        },
        scalars={"scale": options.scale},
        constants=constants_of(chunks.q, heads, options)
        | {
            "HW": chunks.w.shape[2],
            "V": value_dim,
            "BLOCK": block,
            "BLOCK_V": 32,
            "ERASE": options.erase,
            "GATED": options.gated,
            "DECAYED": decayed,
        },
        programs=by_chunk[1] * (key_dim // block) * heads,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
