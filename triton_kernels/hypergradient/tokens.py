"""One token of the hypergradient preconditioner, and a chunk token by token, with resets and the projection."""

import triton
import triton.language as tl

from triton_kernels.hypergradient.chunk import ANCHOR_WEIGHT, BETA, FORGET, RESET, STEP, C, gate, row


@triton.jit
def leave(d, LO: tl.constexpr, HI: tl.constexpr):
    """Return 1 where a value is outside the bounds or NaN, else 0, float32."""
    return tl.where((d >= LO) & (d <= HI), 0.0, 1.0)


@triton.jit
def project(d, BOUNDED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr):
    """Return d clipped to the bounds; NaN stays NaN."""
    if BOUNDED:
        d = tl.where(d < LO, LO, tl.where(d > HI, HI, d))
    return d


@triton.jit
def updated(d, u, coefficient, gates_ptr, t, anchor, FORGETS: tl.constexpr, ANCHORED: tl.constexpr):
    """Return d after token t, before its projection; the coefficient is that of u."""
    if FORGETS:
        d = gate(gates_ptr, FORGET, t) * d
        if ANCHORED:
            d += gate(gates_ptr, ANCHOR_WEIGHT, t) * anchor
    return d + coefficient * u


@triton.jit
def used(d, gates_ptr, t, after_reset, RESETS: tl.constexpr):
    """Return the d that token t uses: that before it, or the state after a reset."""
    if RESETS:
        d = tl.where(gate(gates_ptr, RESET, t) > 0.0, after_reset, d)
    return d


@triton.jit
def follow(
    d, u, feedback_ptr, gates_ptr, t, anchor,
    FORGETS: tl.constexpr, ANCHORED: tl.constexpr, BOUNDED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    """Return d after token t, whose feedback is known, from the d that it uses."""
    coefficient = gate(gates_ptr, STEP, t) * tl.load(feedback_ptr + t)
    return project(updated(d, u, coefficient, gates_ptr, t, anchor, FORGETS, ANCHORED), BOUNDED, LO, HI)


@triton.jit
def leaves_bounds(
    d, k_ptr, feedback_ptr, gates_ptr, anchor, P,
    K: tl.constexpr, FORGETS: tl.constexpr, ANCHORED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    """Return above 0 if a value of a chunk without resets leaves the bounds, given the feedback without a projection.

    A value that leaves them stays what it is here. So the count is right even though the values after it are not.
    """
    count = tl.zeros((K,), tl.float32)
    key = row(k_ptr, 0, P, K)
    for t in tl.range(0, C, loop_unroll_factor=1):
        following = row(k_ptr, tl.minimum(t + 1, C - 1), P, K)
        d = follow(d, key * key, feedback_ptr, gates_ptr, t, anchor, FORGETS, ANCHORED, False, LO, HI)
        count += leave(d, LO, HI)
        key = following
    return tl.sum(count, axis=0)


@triton.jit
def run_tokens(
    d, k_ptr, gates_ptr, after_reset, anchor, P,
    K: tl.constexpr, FORGETS: tl.constexpr, ANCHORED: tl.constexpr, RESETS: tl.constexpr,
    BOUNDED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    """Return (d after a chunk, feedback [64], the two words of `Chunks.kept` [K]), token by token."""
    token = tl.arange(0, C)
    feedback = tl.zeros((C,), tl.float32)
    first_kept = tl.zeros((K,), tl.int32)
    second_kept = tl.zeros((K,), tl.int32)
    key = row(k_ptr, 0, P, K)
    for t in tl.range(0, C, loop_unroll_factor=1):
        following = row(k_ptr, tl.minimum(t + 1, C - 1), P, K)
        u = key * key
        d = used(d, gates_ptr, t, after_reset, RESETS)
        found = 1.0 - gate(gates_ptr, BETA, t) * tl.sum(d * u, axis=0)
        feedback = tl.where(token == t, found, feedback)
        d = updated(d, u, gate(gates_ptr, STEP, t) * found, gates_ptr, t, anchor, FORGETS, ANCHORED)
        if BOUNDED:
            bit = tl.where((d < LO) | (d > HI), 0, 1) << (t % 32)
            first_kept |= tl.where(t < 32, bit, 0)
            second_kept |= tl.where(t < 32, 0, bit)
            d = project(d, BOUNDED, LO, HI)
        key = following
    return d, feedback, first_kept, second_kept


@triton.jit
def kept_at(cotangent, first_kept, second_kept, t):
    """Return the cotangent of d before its projection from that after it: 0 where token t left the bounds."""
    word = tl.where(t < 32, first_kept, second_kept)
    return tl.where((word >> (t % 32)) & 1 != 0, cotangent, 0.0)
