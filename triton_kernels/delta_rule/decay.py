"""A decay per channel: decayed keys, and the products of keys under the decay between them. Parallel over chunks.

The decay of a pair is the exponential of a sum of log decays, which differs by channel. A chunk is halved again and
again: a pair belongs to the level at whose middle its tokens are parted, and both get the decay to that middle, so that
one product serves all pairs of a level. Every exponent is a direct sum of log decays, no difference of sums.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.common.settings import settings
from triton_kernels.common.tiles import bits_of, sum_tokens
from triton_kernels.delta_rule.options import DeltaRuleOptions, constants_of
from triton_kernels.delta_rule.prepare import store_block
from triton_kernels.delta_rule.tiles import rows_at

# Levels of halving of 32 tokens. A kernel gets them at run time: of a known number the compiler unrolls the loop, which
# takes more registers than there are.
LEVELS = 5


@triton.jit
def up_to_mask():
    """Return the mask [32, 32] of the tokens up to and including each one."""
    i = tl.arange(0, 32)
    return (i[:, None] >= i[None, :]).to(tl.bfloat16)


@triton.jit
def after_mask():
    """Return the mask [32, 32] of the tokens after each one."""
    i = tl.arange(0, 32)
    return (i[:, None] < i[None, :]).to(tl.bfloat16)


@triton.jit
def level_mask(level):
    """Return the mask [32, 32] of the tokens between each token and the middle of its block of 2^(level + 1) tokens."""
    i = tl.arange(0, 32)[:, None]
    s = tl.arange(0, 32)[None, :]
    right = (i >> level) % 2 == 1
    between = (right & (s <= i)) | ((right == 0) & (s > i))
    return (((i >> level) == (s >> level)) & between).to(tl.bfloat16)


@triton.jit
def parted(level):
    """Return which pairs [32, 32] are parted at this level: the first on the right of the middle, the other left."""
    i = tl.arange(0, 32)[:, None]
    j = tl.arange(0, 32)[None, :]
    return ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) > (j >> level))


@triton.jit
def times(x, factor):
    """Return x times a float32 factor, in the type of x."""
    return (x.to(tl.float32) * factor).to(x.dtype)


@triton.jit
def pairs_inside(
    q_ptr, k_ptr, w_ptr, log_decay_ptr, token, h, levels,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ERASE: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the products <q_i, w_j> and <k_i, w_j> of the pairs within the 32 tokens from `token`."""
    i = tl.arange(0, 32)
    same = i[:, None] == i[None, :]  # no decay lies between a token and itself
    p = tl.zeros((32, 32), tl.float32)
    a = tl.zeros((32, 32), tl.float32)
    for start in tl.range(0, K, BLOCK, loop_unroll_factor=1):
        channel = start + tl.arange(0, BLOCK)
        q = tl.load(rows_at(q_ptr, token, h // (H // HK), i, channel, HK, K))
        w = tl.load(rows_at(w_ptr, token, h // (H // HW), i, channel, HW, K))
        log_decay = tl.load(rows_at(log_decay_ptr, token, h, i, channel, H, K))
        if ERASE:
            k = tl.load(rows_at(k_ptr, token, h // (H // HK), i, channel, HK, K))
        p += tl.where(same, tl.sum(q.to(tl.float32) * w.to(tl.float32), axis=1)[:, None], 0.0)
        for level in tl.range(0, levels, loop_unroll_factor=1, num_stages=1):
            factor = tl.exp(sum_tokens(level_mask(level), log_decay, PARTS))
            pair = parted(level)
            left = tl.trans(times(w, factor))
            p += tl.where(pair, tl.dot(times(q, factor), left, input_precision=PRECISION), 0.0)
            if ERASE:
                a += tl.where(pair, tl.dot(times(k, factor), left, input_precision=PRECISION), 0.0)
    return p, a


@triton.jit
def delta_rule_decay(
    q_ptr, k_ptr, w_ptr, log_decay_ptr, pairs_ptr, decayed_q_ptr, decayed_k_ptr, decayed_w_ptr, carry_ptr, levels,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ERASE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Decay one chunk of one head, in blocks of 32 tokens: 0 and, in chunks of 64, 1."""
    program = tl.program_id(0).to(tl.int64)  # (batch, chunk, head)
    h = program % H
    i = tl.arange(0, 32)
    token = program // H * C
    TWO: tl.constexpr = C == 64
    key_head = h // (H // HK)
    write_head = h // (H // HW)
    # In loops one after the other: together, their sums and keys do not fit in registers.
    pairs_ptr += program * 2 * C * C
    p, a = pairs_inside(
        q_ptr, k_ptr, w_ptr, log_decay_ptr, token, h, levels, H, HK, HW, K, BLOCK, ERASE, PARTS, PRECISION
    )  # fmt: skip
    store_block(pairs_ptr, 0, 0, p, C, 1)
    if ERASE:
        store_block(pairs_ptr + C * C, 0, 0, a, C, 1)
    if TWO:
        p, a = pairs_inside(
            q_ptr, k_ptr, w_ptr, log_decay_ptr, token + 32, h, levels, H, HK, HW, K, BLOCK, ERASE, PARTS, PRECISION
        )  # fmt: skip
        store_block(pairs_ptr, 32, 32, p, C, 1)
        if ERASE:
            store_block(pairs_ptr + C * C, 32, 32, a, C, 1)
    p = tl.zeros((32, 32), tl.float32)
    a = tl.zeros((32, 32), tl.float32)
    for start in tl.range(0, K, BLOCK, loop_unroll_factor=1):
        channel = start + tl.arange(0, BLOCK)
        g0 = tl.load(rows_at(log_decay_ptr, token, h, i, channel, H, K))
        factor = tl.exp(sum_tokens(up_to_mask(), g0, PARTS))
        q = tl.load(rows_at(q_ptr, token, key_head, i, channel, HK, K))
        tl.store(rows_at(decayed_q_ptr, token, h, i, channel, H, K), times(q, factor))
        if ERASE:
            k = tl.load(rows_at(k_ptr, token, key_head, i, channel, HK, K))
            tl.store(rows_at(decayed_k_ptr, token, h, i, channel, H, K), times(k, factor))
        total = tl.sum(g0, axis=0)
        to_end = sum_tokens(after_mask(), g0, PARTS)
        w = tl.load(rows_at(w_ptr, token, write_head, i, channel, HW, K))
        if TWO:
            left = tl.trans(times(w, tl.exp(to_end)))
            g1 = tl.load(rows_at(log_decay_ptr, token + 32, h, i, channel, H, K))
            later = tl.sum(g1, axis=0)
            to_end += later[None, :]
        tl.store(rows_at(decayed_w_ptr, token, h, i, channel, H, K), times(w, tl.exp(to_end)))
        if TWO:
            factor = tl.exp(sum_tokens(after_mask(), g1, PARTS))
            w = tl.load(rows_at(w_ptr, token + 32, write_head, i, channel, HW, K))
            tl.store(rows_at(decayed_w_ptr, token + 32, h, i, channel, H, K), times(w, factor))
            from_middle = sum_tokens(up_to_mask(), g1, PARTS)
            q = tl.load(rows_at(q_ptr, token + 32, key_head, i, channel, HK, K))
            p = tl.dot(times(q, tl.exp(from_middle)), left, p, input_precision=PRECISION)
            factor = tl.exp(from_middle + total[None, :])
            tl.store(rows_at(decayed_q_ptr, token + 32, h, i, channel, H, K), times(q, factor))
            if ERASE:
                k = tl.load(rows_at(k_ptr, token + 32, key_head, i, channel, HK, K))
                a = tl.dot(times(k, tl.exp(from_middle)), left, a, input_precision=PRECISION)
                tl.store(rows_at(decayed_k_ptr, token + 32, h, i, channel, H, K), times(k, factor))
            total += later
        tl.store(carry_ptr + program * K + channel, tl.exp(total))
    if TWO:
        store_block(pairs_ptr, 32, 0, p, C, 1)
        if ERASE:
            store_block(pairs_ptr + C * C, 32, 0, a, C, 1)


def parts_of(dtype: jnp.dtype) -> int:
    """Return in how many bfloat16 parts of 8 bits log decays are summed next to inputs of this type."""
    return 2 if bits_of(dtype) == 16 else 3


def decay(
    q: jax.Array, k: jax.Array, w: jax.Array, log_decay: jax.Array, options: DeltaRuleOptions
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the products of keys, the decayed q, k and w, and the decay of the state over each chunk.

    The products <q, w> and <k, w> [B, N, H, 2, C, C] are float32, undefined above the diagonal; the keys [B, T, H, K]
    have the type of q, and without erase k is not decayed; the decay [B, N, H, K] is float32.

    Args:
        q, k: [B, T, Hk, K].
        w: [B, T, Hw, K].
        log_decay: [B, T, H, K] float32.
        options: static options.
    """
    batch, length, heads, key_dim = log_decay.shape
    chunk = options.chunk
    by_chunk = (batch, length // chunk, heads)
    chosen = settings("delta_rule_decay", options.target, bits_of(q.dtype), key_dim)
    decayed = jax.ShapeDtypeStruct(log_decay.shape, q.dtype)
    found = launch(
        delta_rule_decay,
        inputs={"q_ptr": q, "k_ptr": k, "w_ptr": w, "log_decay_ptr": log_decay},
        outputs={
            "pairs_ptr": jax.ShapeDtypeStruct((*by_chunk, 2, chunk, chunk), jnp.float32),
            "decayed_q_ptr": decayed,
            "decayed_k_ptr": decayed if options.erase else None,
            "decayed_w_ptr": decayed,
            "carry_ptr": jax.ShapeDtypeStruct((*by_chunk, key_dim), jnp.float32),
        },
        scalars={"levels": LEVELS},
        constants=constants_of(q, heads, options)
        | {
            "HW": w.shape[2],
            "BLOCK": min(chosen.block, key_dim),
            "ERASE": options.erase,
            "PARTS": parts_of(q.dtype),
        },
        programs=by_chunk[1] * heads,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
    k = found.decayed_k_ptr if options.erase else found.decayed_q_ptr
    return found.pairs_ptr, found.decayed_q_ptr, k, found.decayed_w_ptr, found.carry_ptr
