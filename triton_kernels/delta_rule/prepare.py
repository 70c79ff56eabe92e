"""The work in a chunk that does not depend on the state: scores and the inverse. Parallel over chunks and heads."""

import jax
import triton
import triton.language as tl

from triton_kernels.common.gates import BETA, GATES, TO_END, gate, pair_decay
from triton_kernels.common.launch import launch
from triton_kernels.common.settings import settings
from triton_kernels.common.tiles import bits_of, product, unit_lower_inverse
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions, constants_of, halves_of
from triton_kernels.delta_rule.tiles import low, rows_at, store_halves


@triton.jit
def load_block(ptr, first, second, C: tl.constexpr):
    """Return the block [32, 32] at (first, second) of a matrix [C, C]."""
    i = tl.arange(0, 32)
    return tl.load(ptr + (first + i[:, None]) * C + second + i[None, :])


@triton.jit
def store_block(ptr, first, second, x, C: tl.constexpr, HALVES: tl.constexpr):
    """Store the block [32, 32] at (first, second) of a matrix [C, C], in HALVES parts."""
    i = tl.arange(0, 32)
    store_halves(ptr + (first + i[:, None]) * C + second + i[None, :], C * C, x, HALVES)


@triton.jit
def add_transposed(total, x, w, PRECISION: tl.constexpr, HALVES: tl.constexpr):
    """Return total + x^T w, with x rounded to HALVES parts of the type of w."""
    high = x.to(w.dtype)
    total = tl.dot(tl.trans(high), w, total, input_precision=PRECISION)
    if HALVES == 2:
        total = tl.dot(tl.trans(low(x, high)), w, total, input_precision=PRECISION)
    return total


@triton.jit
def delta_rule_prepare(
    q_ptr, k_ptr, w_ptr, gates_ptr, pairs_ptr, scores_ptr, solved_ptr, inverse_ptr, scale,
    H: tl.constexpr, HK: tl.constexpr, HW: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    ERASE: tl.constexpr, DECAY: tl.constexpr, RESETS: tl.constexpr, GIVEN: tl.constexpr, GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Solve one chunk of one head, in blocks of 32 tokens: 0 and, in chunks of 64, 1.

    p and a are blocks of P and A, x those of (I + A)^-1. GIVEN: the products of keys are read from pairs_ptr.
    """
    program = tl.program_id(0).to(tl.int64)  # (batch, chunk, head)
    h = program % H
    token = program // H * C
    gates_ptr += program * GATES * C
    pairs_ptr += program * 2 * C * C
    scores_ptr += program * C * C
    inverse_ptr += program * HALVES * C * C
    i = tl.arange(0, 32)
    TWO: tl.constexpr = C == 64
    key_head = h // (H // HK)
    write_head = h // (H // HW)
    p00 = tl.zeros((32, 32), tl.float32)
    p10 = tl.zeros((32, 32), tl.float32)
    p11 = tl.zeros((32, 32), tl.float32)
    a00 = tl.zeros((32, 32), tl.float32)
    a10 = tl.zeros((32, 32), tl.float32)
    a11 = tl.zeros((32, 32), tl.float32)
    if GIVEN:
        p00 = load_block(pairs_ptr, 0, 0, C)
        if ERASE:
            a00 = load_block(pairs_ptr + C * C, 0, 0, C)
        if TWO:
            p10 = load_block(pairs_ptr, 32, 0, C)
            p11 = load_block(pairs_ptr, 32, 32, C)
            if ERASE:
                a10 = load_block(pairs_ptr + C * C, 32, 0, C)
                a11 = load_block(pairs_ptr + C * C, 32, 32, C)
    else:
        for start in tl.range(0, K, BLOCK, loop_unroll_factor=1):
            channel = start + tl.arange(0, BLOCK)
            w0 = tl.trans(tl.load(rows_at(w_ptr, token, write_head, i, channel, HW, K)))
            q0 = tl.load(rows_at(q_ptr, token, key_head, i, channel, HK, K))
            p00 = tl.dot(q0, w0, p00, input_precision=PRECISION)
            if ERASE:
                k0 = tl.load(rows_at(k_ptr, token, key_head, i, channel, HK, K))
                a00 = tl.dot(k0, w0, a00, input_precision=PRECISION)
            if TWO:
                w1 = tl.trans(tl.load(rows_at(w_ptr, token + 32, write_head, i, channel, HW, K)))
                q1 = tl.load(rows_at(q_ptr, token + 32, key_head, i, channel, HK, K))
                p10 = tl.dot(q1, w0, p10, input_precision=PRECISION)
                p11 = tl.dot(q1, w1, p11, input_precision=PRECISION)
                if ERASE:
                    k1 = tl.load(rows_at(k_ptr, token + 32, key_head, i, channel, HK, K))
                    a10 = tl.dot(k1, w0, a10, input_precision=PRECISION)
                    a11 = tl.dot(k1, w1, a11, input_precision=PRECISION)

    below = i[:, None] > i[None, :]
    decay = pair_decay(gates_ptr, i, i, C, DECAY, RESETS)
    p00 *= decay * scale
    beta0 = gate(gates_ptr, BETA, i, C)[:, None]
    a00 = tl.where(below, a00 * decay * beta0, 0.0)
    if TWO:
        decay = pair_decay(gates_ptr, 32 + i, 32 + i, C, DECAY, RESETS)
        p11 *= decay * scale
        beta1 = gate(gates_ptr, BETA, 32 + i, C)[:, None]
        a11 = tl.where(below, a11 * decay * beta1, 0.0)
        decay = pair_decay(gates_ptr, 32 + i, i, C, DECAY, RESETS)
        p10 *= decay * scale
        a10 *= decay * beta1
        store_block(scores_ptr, 0, 32, tl.zeros((32, 32), tl.float32), C, 1)
    if not ERASE:
        store_block(scores_ptr, 0, 0, p00, C, 1)
        if TWO:
            store_block(scores_ptr, 32, 0, p10, C, 1)
            store_block(scores_ptr, 32, 32, p11, C, 1)
    else:
        # P and w have nearly equal rows if keys are nearly parallel: they are multiplied by the inverse to about
        # float32 precision, and only the products are rounded.
        x00 = unit_lower_inverse(a00, PRECISION)
        store_block(scores_ptr, 0, 0, product(p00, x00, PRECISION), C, 1)
        if TWO:
            x11 = unit_lower_inverse(a11, PRECISION)
            store_block(scores_ptr, 32, 32, product(p11, x11, PRECISION), C, 1)
            x10 = -product(x11, product(a10, x00, PRECISION), PRECISION)
            s10 = tl.dot(p11, x10, product(p10, x00, PRECISION), input_precision=PRECISION)
            store_block(scores_ptr, 32, 0, s10, C, 1)
        if GRADIENT:
            store_block(inverse_ptr, 0, 0, x00, C, HALVES)
            if TWO:
                store_block(inverse_ptr, 32, 0, x10, C, HALVES)
                store_block(inverse_ptr, 32, 32, x11, C, HALVES)
                store_block(inverse_ptr, 0, 32, tl.zeros((32, 32), tl.float32), C, HALVES)
        # Scale the rows of the inverse, which is float32 here, not those of w.
        x00 *= gate(gates_ptr, TO_END, i, C)[:, None]
        if TWO:
            x10 *= gate(gates_ptr, TO_END, 32 + i, C)[:, None]
            x11 *= gate(gates_ptr, TO_END, 32 + i, C)[:, None]
        for start in tl.range(0, K, BLOCK, loop_unroll_factor=1):
            channel = start + tl.arange(0, BLOCK)
            w0 = tl.load(rows_at(w_ptr, token, write_head, i, channel, HW, K))
            solved = add_transposed(tl.zeros((32, BLOCK), tl.float32), x00, w0, PRECISION, HALVES)
            if TWO:
                w1 = tl.load(rows_at(w_ptr, token + 32, write_head, i, channel, HW, K))
                solved = add_transposed(solved, x10, w1, PRECISION, HALVES)
                lower = add_transposed(tl.zeros((32, BLOCK), tl.float32), x11, w1, PRECISION, HALVES)
                at = rows_at(solved_ptr, token + 32, h, i, channel, H, K)
                tl.store(at, lower.to(w1.dtype))
            tl.store(rows_at(solved_ptr, token, h, i, channel, H, K), solved.to(w0.dtype))


def prepare(
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    gates: jax.Array,
    pairs: jax.Array | None,
    options: DeltaRuleOptions,
    *,
    gradient: bool,
) -> Chunks:
    """Prepare the chunks.

    A_ij = beta_i <k_i, w_j> decay_ij below the diagonal, and P_ij = scale <q_i, w_j> decay_ij on and below it.

    Args:
        q, k: [B, T, Hk, K], T a multiple of the chunk; under a decay per channel decayed, [B, T, H, K].
        w: write keys [B, T, Hw, K].
        gates: [B, N, H, GATES, C].
        pairs: under a decay per channel the decayed <q, w> and <k, w> [B, N, H, 2, C, C] float32; else None.
        options: static options.
        gradient: return the inverse too.
    """
    batch, count, heads, _, chunk = gates.shape
    key_dim, dtype = q.shape[3], q.dtype
    chosen = settings("delta_rule_prepare", options.target, bits_of(dtype), key_dim)
    by_chunk = (batch, count, heads)
    square = jax.ShapeDtypeStruct((*by_chunk, chunk, chunk), dtype)
    solved = jax.ShapeDtypeStruct((batch, count * chunk, heads, key_dim), dtype)
    inverse = jax.ShapeDtypeStruct((*by_chunk, halves_of(dtype), chunk, chunk), dtype)
    found = launch(
        delta_rule_prepare,
        inputs={"q_ptr": q, "k_ptr": k, "w_ptr": w, "gates_ptr": gates, "pairs_ptr": pairs},
        outputs={
            "scores_ptr": square,
            "solved_ptr": solved if options.erase else None,
            "inverse_ptr": inverse if options.erase and gradient else None,
        },
        scalars={"scale": options.scale},
        constants=constants_of(q, heads, options)
        | {
            "HW": w.shape[2],
            "BLOCK": min(chosen.block, key_dim),
            "ERASE": options.erase,
            "DECAY": options.decay,
            "RESETS": options.resets,
            "GIVEN": pairs is not None,
            "GRADIENT": gradient,
        },
        programs=count * heads,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
    if not options.erase:
        return Chunks(q, k, w, gates, None, found.scores_ptr, None, None)
    return Chunks(q, k, w, gates, None, found.scores_ptr, found.solved_ptr, found.inverse_ptr if gradient else None)
