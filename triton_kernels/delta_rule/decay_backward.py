"""Gradients of q, k, w and of the log decays under a decay per channel. Parallel over chunks, heads and channels.

No exponent's gradient is a difference of sums: it goes to the tokens that the exponent sums over, through the masks of
`decay`, transposed.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.common.settings import settings
from triton_kernels.common.tiles import bits_of, sum_tokens
from triton_kernels.delta_rule.decay import LEVELS, after_mask, level_mask, parted, parts_of, times, up_to_mask
from triton_kernels.delta_rule.options import DeltaRuleOptions, constants_of
from triton_kernels.delta_rule.prepare import load_block
from triton_kernels.delta_rule.tiles import rows_at


@triton.jit
def add_inside(
    q_ptr, k_ptr, w_ptr, log_decay_ptr, d_p_ptr, d_a_ptr, d_q, d_k, d_w, d_log, token, first, h, channel, levels,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ERASE: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the terms of the pairs within the 32 tokens from `first` to the gradients of q, k, w and the log decays.

    It loads the keys again: held over from the terms before, they do not fit in registers.
    """
    i = tl.arange(0, 32)
    q = tl.load(rows_at(q_ptr, token + first, h // (H // HK), i, channel, HK, K))
    w = tl.load(rows_at(w_ptr, token + first, h // (H // HW), i, channel, HW, K))
    log_decay = tl.load(rows_at(log_decay_ptr, token + first, h, i, channel, H, K))
    d_p = load_block(d_p_ptr, first, first, C)
    if ERASE:
        k = tl.load(rows_at(k_ptr, token + first, h // (H // HK), i, channel, HK, K))
        d_a = load_block(d_a_ptr, first, first, C)
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], d_p.to(tl.float32), 0.0), axis=1)[:, None]
    d_q += diagonal * w.to(tl.float32)
    d_w += diagonal * q.to(tl.float32)
    for level in tl.range(0, levels, loop_unroll_factor=1, num_stages=1):
        factor = tl.exp(sum_tokens(level_mask(level), log_decay, PARTS))
        pair = parted(level)
        decayed_q = times(q, factor)
        decayed_w = times(w, factor)
        d_p_here = tl.where(pair, d_p, 0.0).to(d_p.dtype)
        d_x = tl.dot(d_p_here, decayed_w, input_precision=PRECISION)
        d_q += factor * d_x
        exponent = decayed_q.to(tl.float32) * d_x
        d_x = tl.dot(tl.trans(d_p_here), decayed_q, input_precision=PRECISION)
        if ERASE:
            decayed_k = times(k, factor)
            d_a_here = tl.where(pair, d_a, 0.0).to(d_a.dtype)
            d_y = tl.dot(d_a_here, decayed_w, input_precision=PRECISION)
            d_k += factor * d_y
            exponent += decayed_k.to(tl.float32) * d_y
            d_x = tl.dot(tl.trans(d_a_here), decayed_k, d_x, input_precision=PRECISION)
        d_w += factor * d_x
        exponent += decayed_w.to(tl.float32) * d_x
        d_log += sum_tokens(tl.trans(level_mask(level)), exponent, PARTS)
    return d_q, d_k, d_w, d_log


@triton.jit
def delta_rule_decay_backward(
    q_ptr, k_ptr, w_ptr, log_decay_ptr, d_pairs_ptr, d_decayed_q_ptr, d_decayed_k_ptr, d_decayed_w_ptr,
    d_q_ptr, d_k_ptr, d_w_ptr, d_log_decay_ptr, levels,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ERASE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Differentiate BLOCK channels of one chunk of one head, in blocks of 32 tokens: 0 and, in chunks of 64, 1."""
    program = tl.program_id(0).to(tl.int64)  # (batch, chunk, block of channels, head)
    h = program % H
    block = (program // H % (K // BLOCK)).to(tl.int32)
    chunk = program // (H * (K // BLOCK)) * H + h
    channel = block * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, 32)
    token = chunk // H * C
    TWO: tl.constexpr = C == 64
    key_head = h // (H // HK)
    write_head = h // (H // HW)
    d_p_ptr = d_pairs_ptr + chunk * 2 * HALVES * C * C
    d_a_ptr = d_p_ptr + HALVES * C * C
    q0 = tl.load(rows_at(q_ptr, token, key_head, i, channel, HK, K))
    k0 = tl.load(rows_at(k_ptr, token, key_head, i, channel, HK, K))
    w0 = tl.load(rows_at(w_ptr, token, write_head, i, channel, HW, K))
    g0 = tl.load(rows_at(log_decay_ptr, token, h, i, channel, H, K))

    # Through the states at the two ends of the chunk, and the pairs of a token of each block.
    factor = tl.exp(sum_tokens(up_to_mask(), g0, PARTS))
    d_x = tl.load(rows_at(d_decayed_q_ptr, token, h, i, channel, H, K)).to(tl.float32)
    d_q0 = factor * d_x
    from_start = times(q0, factor).to(tl.float32) * d_x
    d_k0 = tl.zeros((32, BLOCK), tl.float32)
    if ERASE:
        d_x = tl.load(rows_at(d_decayed_k_ptr, token, h, i, channel, H, K)).to(tl.float32)
        d_k0 = factor * d_x
        from_start += times(k0, factor).to(tl.float32) * d_x
    to_middle = sum_tokens(after_mask(), g0, PARTS)
    to_end = to_middle
    if TWO:
        q1 = tl.load(rows_at(q_ptr, token + 32, key_head, i, channel, HK, K))
        k1 = tl.load(rows_at(k_ptr, token + 32, key_head, i, channel, HK, K))
        w1 = tl.load(rows_at(w_ptr, token + 32, write_head, i, channel, HW, K))
        g1 = tl.load(rows_at(log_decay_ptr, token + 32, h, i, channel, H, K))
        to_end += tl.sum(g1, axis=0)[None, :]
    factor = tl.exp(to_end)
    d_x = tl.load(rows_at(d_decayed_w_ptr, token, h, i, channel, H, K)).to(tl.float32)
    d_w0 = factor * d_x
    d_to_end = times(w0, factor).to(tl.float32) * d_x
    d_log0 = sum_tokens(tl.trans(up_to_mask()), from_start, PARTS)
    if TWO:
        d_later = tl.sum(d_to_end, axis=0)  # every log decay of block 1 lies between block 0 and the end
        from_middle = sum_tokens(up_to_mask(), g1, PARTS)
        factor = tl.exp(from_middle + tl.sum(g0, axis=0)[None, :])
        d_x = tl.load(rows_at(d_decayed_q_ptr, token + 32, h, i, channel, H, K)).to(tl.float32)
        d_q1 = factor * d_x
        d_from = times(q1, factor).to(tl.float32) * d_x
        d_k1 = tl.zeros((32, BLOCK), tl.float32)
        if ERASE:
            d_x = tl.load(rows_at(d_decayed_k_ptr, token + 32, h, i, channel, H, K)).to(tl.float32)
            d_k1 = factor * d_x
            d_from += times(k1, factor).to(tl.float32) * d_x
        d_earlier = tl.sum(d_from, axis=0)  # every log decay of block 0 lies between the start and block 1
        factor = tl.exp(sum_tokens(after_mask(), g1, PARTS))
        d_x = tl.load(rows_at(d_decayed_w_ptr, token + 32, h, i, channel, H, K)).to(tl.float32)
        d_w1 = factor * d_x
        d_log1 = sum_tokens(tl.trans(after_mask()), times(w1, factor).to(tl.float32) * d_x, PARTS)

        factor = tl.exp(from_middle)
        factor_w = tl.exp(to_middle)
        decayed_w = times(w0, factor_w)
        d_p = load_block(d_p_ptr, 32, 0, C)
        decayed = times(q1, factor)
        d_x = tl.dot(d_p, decayed_w, input_precision=PRECISION)
        d_q1 += factor * d_x
        d_from += decayed.to(tl.float32) * d_x
        d_left = tl.dot(tl.trans(d_p), decayed, input_precision=PRECISION)
        if ERASE:
            d_a = load_block(d_a_ptr, 32, 0, C)
            decayed = times(k1, factor)
            d_x = tl.dot(d_a, decayed_w, input_precision=PRECISION)
            d_k1 += factor * d_x
            d_from += decayed.to(tl.float32) * d_x
            d_left = tl.dot(tl.trans(d_a), decayed, d_left, input_precision=PRECISION)
        d_w0 += factor_w * d_left
        d_to_end += decayed_w.to(tl.float32) * d_left
        d_log0 += d_earlier[None, :]
        d_log1 += sum_tokens(tl.trans(up_to_mask()), d_from, PARTS) + d_later[None, :]
        d_q1, d_k1, d_w1, d_log1 = add_inside(
            q_ptr, k_ptr, w_ptr, log_decay_ptr, d_p_ptr, d_a_ptr, d_q1, d_k1, d_w1, d_log1, token, 32, h, channel,
            levels, H, HK, HW, K, C, ERASE, PARTS, PRECISION,
        )  # fmt: skip
        tl.store(rows_at(d_q_ptr, token + 32, h, i, channel, H, K), d_q1.to(d_q_ptr.dtype.element_ty))
        tl.store(rows_at(d_k_ptr, token + 32, h, i, channel, H, K), d_k1.to(d_k_ptr.dtype.element_ty))
        tl.store(rows_at(d_w_ptr, token + 32, h, i, channel, H, K), d_w1.to(d_w_ptr.dtype.element_ty))
        tl.store(rows_at(d_log_decay_ptr, token + 32, h, i, channel, H, K), d_log1)
    d_log0 += sum_tokens(tl.trans(after_mask()), d_to_end, PARTS)
    d_q0, d_k0, d_w0, d_log0 = add_inside(
        q_ptr, k_ptr, w_ptr, log_decay_ptr, d_p_ptr, d_a_ptr, d_q0, d_k0, d_w0, d_log0, token, 0, h, channel,
        levels, H, HK, HW, K, C, ERASE, PARTS, PRECISION,
    )  # fmt: skip
    tl.store(rows_at(d_q_ptr, token, h, i, channel, H, K), d_q0.to(d_q_ptr.dtype.element_ty))
    tl.store(rows_at(d_k_ptr, token, h, i, channel, H, K), d_k0.to(d_k_ptr.dtype.element_ty))
    tl.store(rows_at(d_w_ptr, token, h, i, channel, H, K), d_w0.to(d_w_ptr.dtype.element_ty))
    tl.store(rows_at(d_log_decay_ptr, token, h, i, channel, H, K), d_log0)


def decay_backward(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    log_decay: jax.Array,
    d_pairs: jax.Array,
    d_decayed: tuple[jax.Array, jax.Array | None, jax.Array],
    options: DeltaRuleOptions,
) -> list[jax.Array]:
    """Return dq, dk, dw and d_log_decay by value head, the last without the decay of the state over a chunk.

    All are [B, T, H, K]; the first three in the type of the decayed gradients. Without erase dk is zero.

    Args:
        q, k: [B, T, Hk, K].
        w: write keys [B, T, Hw, K].
        log_decay: [B, T, H, K] float32.
        d_pairs: of `pairs`.
        d_decayed: of `keys`: the gradients of the decayed q, k (None without erase) and w, [B, T, H, K].
        options: static options.
    """
    _, length, heads, key_dim = log_decay.shape
    chosen = settings("delta_rule_decay_backward", options.target, bits_of(q.dtype), key_dim)
    block = min(chosen.block, key_dim)
    result = jax.ShapeDtypeStruct(log_decay.shape, d_decayed[0].dtype)
    found = launch(
        delta_rule_decay_backward,
        inputs={
            "q_ptr": q,
            "k_ptr": k,
            "w_ptr": w,
            "log_decay_ptr": log_decay,
            "d_pairs_ptr": d_pairs,
            "d_decayed_q_ptr": d_decayed[0],
            "d_decayed_k_ptr": d_decayed[1],
            "d_decayed_w_ptr": d_decayed[2],
        },
        outputs={
            "d_q_ptr": result,
            "d_k_ptr": result,
            "d_w_ptr": result,
            "d_log_decay_ptr": jax.ShapeDtypeStruct(log_decay.shape, jnp.float32),
        },
        scalars={"levels": LEVELS},
        constants=constants_of(q, heads, options)
        | {"HW": w.shape[2], "BLOCK": block, "ERASE": options.erase, "PARTS": parts_of(q.dtype)},
        programs=(length // options.chunk) * (key_dim // block) * heads,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
    return [found.d_q_ptr, found.d_k_ptr, found.d_w_ptr, found.d_log_decay_ptr]
