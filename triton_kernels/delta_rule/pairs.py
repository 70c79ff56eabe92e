"""Gradients of the pairs of tokens in a chunk, and what each token writes. Parallel over chunks and heads."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.gates import BETA, GATES, gate, pair_decay
from triton_kernels.common.launch import launch
from triton_kernels.common.settings import settings
from triton_kernels.common.tiles import bits_of
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions, constants_of, halves_of
from triton_kernels.delta_rule.tiles import halves_at, low, rows_at, store_halves


@triton.jit
def delta_rule_pairs(
    d_out_ptr, residual_ptr, z_ptr, gates_ptr, inverse_ptr, written_ptr, d_pairs_ptr, z_written_ptr, scale,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ERASE: tl.constexpr, DECAY: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Sum over the values of one chunk of one head, BLOCK at a time."""
    program = tl.program_id(0).to(tl.int64)  # (batch, chunk, head)
    h = program % H
    i = tl.arange(0, C)
    token = program // H * C
    square = i[:, None] * C + i[None, :]
    gates = gates_ptr + program * GATES * C
    inverse_ptr += program * HALVES * C * C
    d_scores = tl.zeros((C, C), tl.float32)
    d_lower = tl.zeros((C, C), tl.float32)
    z_written = tl.zeros((C,), tl.float32)
    for start in tl.range(0, V, BLOCK, loop_unroll_factor=1):
        value = start + tl.arange(0, BLOCK)
        at = halves_at(residual_ptr, token, h, i, value, H, V, HALVES)
        written = tl.load(at)
        exact = written.to(tl.float32)
        if HALVES == 2:
            rest = tl.load(at + H * V)
            exact += rest.to(tl.float32)
        if ERASE:
            inverse = tl.load(inverse_ptr + square)
            exact = tl.dot(inverse, written, input_precision=PRECISION)
            if HALVES == 2:
                exact = tl.dot(inverse, rest, exact, input_precision=PRECISION)
                inverse = tl.load(inverse_ptr + C * C + square)
                exact = tl.dot(inverse, written, exact, input_precision=PRECISION)
            written = exact.to(written_ptr.dtype.element_ty)
            at = halves_at(written_ptr, token, h, i, value, H, V, HALVES)
            tl.store(at, written)
            if HALVES == 2:
                rest = low(exact, written)
                tl.store(at + H * V, rest)
        d_out = tl.load(rows_at(d_out_ptr, token, h, i, value, H, V))
        d_scores = tl.dot(d_out, tl.trans(written), d_scores, input_precision=PRECISION)
        at = halves_at(z_ptr, token, h, i, value, H, V, HALVES)
        z = tl.load(at)
        z_exact = z.to(tl.float32)
        if ERASE:
            d_lower = tl.dot(z, tl.trans(written), d_lower, input_precision=PRECISION)
        if HALVES == 2:
            d_scores = tl.dot(d_out, tl.trans(rest), d_scores, input_precision=PRECISION)
            z_rest = tl.load(at + H * V)
            z_exact += z_rest.to(tl.float32)
            if ERASE:
                d_lower = tl.dot(z, tl.trans(rest), d_lower, input_precision=PRECISION)
                d_lower = tl.dot(z_rest, tl.trans(written), d_lower, input_precision=PRECISION)
        z_written += tl.sum(z_exact * exact, axis=1)
    tl.store(z_written_ptr + program * C + i, z_written)
    decay = pair_decay(gates, i, i, C, DECAY, RESETS)
    d_pairs_ptr += program * 2 * HALVES * C * C
    store_halves(d_pairs_ptr + square, C * C, d_scores * decay * scale, HALVES)
    if ERASE:
        d_lower = tl.where(i[:, None] > i[None, :], -d_lower * decay, 0.0) * gate(gates, BETA, i, C)[:, None]
        store_halves(d_pairs_ptr + HALVES * C * C + square, C * C, d_lower, HALVES)


def pairs(chunks: Chunks, d_out: jax.Array, residual: jax.Array, z: jax.Array, options: DeltaRuleOptions) -> Any:
    """Return a namespace of what the gradients of the keys need.

    `written_ptr`, R = (I + A)^-1 residual, in halves [B, T, halves, H, V]; `d_pairs_ptr`, the gradients of <q, w> in P
    and of <k, w> in A, in halves [B, N, H, 2, halves, C, C]; `z_written_ptr`, sums of Z R over values [B, N, H, C]
    float32.

    Args:
        chunks: of `prepare`, for a gradient.
        d_out: gradient of the outputs [B, T, H, V].
        residual: of `scan`.
        z: of `scan_backward`.
        options: static options.
    """
    batch, length, heads, value_dim = d_out.shape
    dtype, chunk, halves = d_out.dtype, options.chunk, halves_of(d_out.dtype)
    by_chunk = (batch, length // chunk, heads)
    chosen = settings("delta_rule_pairs", options.target, bits_of(dtype), chunks.q.shape[3])
    found = launch(
        delta_rule_pairs,
        inputs={
            "d_out_ptr": d_out,
            "residual_ptr": residual,
            "z_ptr": z,
            "gates_ptr": chunks.gates,
            "inverse_ptr": chunks.inverse,
        },
        outputs={
            "written_ptr": jax.ShapeDtypeStruct(residual.shape, dtype) if options.erase else None,
            "d_pairs_ptr": jax.ShapeDtypeStruct((*by_chunk, 2, halves, chunk, chunk), dtype),
            "z_written_ptr": jax.ShapeDtypeStruct((*by_chunk, chunk), jnp.float32),
        },
        scalars={"scale": options.scale},
        constants=constants_of(chunks.q, heads, options)
        | {
            "V": value_dim,
            "BLOCK": min(chosen.block, value_dim),
            "ERASE": options.erase,
            "DECAY": options.decay,
            "RESETS": options.resets,
        },
        programs=by_chunk[1] * heads,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
    if not options.erase:
        found.written_ptr = residual
    return found
