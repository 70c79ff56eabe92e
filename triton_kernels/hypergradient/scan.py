"""The forward scan over chunks of the hypergradient preconditioner: one program per head keeps the state in registers.

The chain from one chunk to the next decides how long the scan takes. So it computes no more than the next chunk needs,
the feedback of every token and d after the last one: sums over channels or tokens, without products of matrices.
`expand` does the rest, in parallel over all chunks.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.hypergradient.chunk import (
    BETA,
    CHUNK,
    DECAY_BEFORE,
    FORGET,
    RESET,
    STEP,
    TO_END,
    WORDS,
    C,
    Chunks,
    HypergradientOptions,
    gate,
    head_index,
    number_and_heads,
    tile,
    tokens_at,
)
from triton_kernels.hypergradient.tokens import leave, leaves_bounds, run_tokens

# Relative safety margins of the estimate of the values of a chunk, far above rounding errors: of the sum of the terms
# of one sign, and of the decayed d from before the chunk.
_SUM_MARGIN = tl.constexpr(2.0**-12)
_START_MARGIN = tl.constexpr(2.0**-18)


def scan(
    k: jax.Array,
    gates: jax.Array,
    inverse: jax.Array,
    initial: jax.Array,
    after_reset: jax.Array,
    anchor: jax.Array,
    options: HypergradientOptions,
) -> tuple[Chunks, jax.Array]:
    """Return the chunks with d before each, the feedback and the sequential ones, and d after the last [B, P, K].

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, rows, 64].
        inverse: of `prepare`.
        initial: d before the first chunk [B, P, K] float32.
        after_reset: d after a reset [B, P, K] float32.
        anchor: [B, P, K] float32.
        options: of the kernel.
    """
    batch, _, heads, size = k.shape
    leading = (batch, heads, gates.shape[2])
    chosen = options.settings("hypergradient_scan", k)
    sequential, bounded = options.may_run_sequentially, options.bounds is not None
    found = launch(
        hypergradient_scan,
        inputs={
            "k_ptr": k,
            "gates_ptr": gates,
            "inverse_ptr": inverse,
            "initial_ptr": initial,
            "after_reset_ptr": after_reset,
            "anchor_ptr": anchor,
        },
        outputs={
            "start_ptr": jax.ShapeDtypeStruct((*leading, size), jnp.float32),
            "feedback_ptr": jax.ShapeDtypeStruct((*leading, CHUNK), jnp.float32),
            "sequential_ptr": jax.ShapeDtypeStruct(leading, jnp.int32) if sequential else None,
            "kept_ptr": jax.ShapeDtypeStruct((*leading, WORDS.value, size), jnp.int32) if bounded else None,
            "final_ptr": jax.ShapeDtypeStruct(initial.shape, jnp.float32),
        },
        scalars=number_and_heads(k),
        constants=options.constants(k) | {"PREFETCH": chosen.stages > 1},
        programs=heads,
        target=options.target,
        warps=chosen.warps,
    )
    flags = found.sequential_ptr if sequential else None, found.kept_ptr if bounded else None
    return Chunks(k, gates, found.start_ptr, found.feedback_ptr, *flags, after_reset, anchor), found.final_ptr


@triton.jit
def load_inverse(inverse_ptr, chunk):
    """Return (I + L)^-1 of a chunk [64, 64]; its upper right block of 32 is not loaded."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.load(inverse_ptr + chunk * C * C + i * C + j, mask=i // 32 >= j // 32, other=0.0)


@triton.jit
def load_gates(gates_ptr, FORGETS: tl.constexpr):
    """Return what the chain reads of the gates of a chunk: (step, beta, decay before, decay to the end) of each token.

    Without forgetting the last two are not used. All are loaded together: on the chain each load would be waited for.
    """
    token = tl.arange(0, C)
    step = gate(gates_ptr, STEP, token)
    beta = gate(gates_ptr, BETA, token)
    before = step
    to_end = step
    if FORGETS:
        before = gate(gates_ptr, DECAY_BEFORE, token)
        to_end = gate(gates_ptr, TO_END, token)
    return step, beta, before, to_end


@triton.jit
def load_decay(gates_ptr, FORGETS: tl.constexpr):
    """Return the decay over a chunk; without forgetting it is not used."""
    decay = 1.0
    if FORGETS:
        decay = gate(gates_ptr, DECAY_BEFORE, C - 1) * gate(gates_ptr, FORGET, C - 1)
    return decay


@triton.jit
def solve(d, k, inverse, beta, before, anchor, FORGETS: tl.constexpr, ANCHORED: tl.constexpr):
    """Return the feedback of every token of a chunk [64] without a projection."""
    u = k.to(tl.float32)
    u *= u
    origin = d
    if ANCHORED:
        origin = d - anchor
    predicted = tl.sum(u * origin[None, :], axis=1)
    if FORGETS:
        predicted *= before
    if ANCHORED:
        predicted += tl.sum(u * anchor[None, :], axis=1)
    return tl.sum(inverse * (1.0 - beta * predicted)[None, :], axis=1)


@triton.jit
def advance(
    d, k, coefficient, to_end, decay, anchor,
    FORGETS: tl.constexpr, ANCHORED: tl.constexpr, BOUNDED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr,
):  # fmt: skip
    """Return d after a chunk without a projection, and above 0 if a d inside the chunk may be out of bounds.

    The contribution of a token never grows after it. So every d of a channel is at least the smaller of d before the
    chunk and its decayed value at the end, plus all negative contributions; and at most the larger of the two, plus all
    positive ones.
    """
    u = k.to(tl.float32)
    u *= u
    decayed = d
    remaining = coefficient
    if FORGETS:
        remaining = coefficient * to_end
        if ANCHORED:
            decayed = anchor + decay * (d - anchor)
        else:
            decayed = d * decay
    after = decayed + tl.sum(u * remaining[:, None], axis=0)
    suspects = 0.0
    if BOUNDED:
        up = tl.sum(u * tl.where(coefficient > 0.0, coefficient, 0.0)[:, None], axis=0)
        down = tl.sum(u * tl.where(coefficient < 0.0, coefficient, 0.0)[:, None], axis=0)
        least = tl.minimum(d, decayed)
        most = tl.maximum(d, decayed)
        if ANCHORED:
            margin = (tl.abs(d) + tl.abs(anchor)) * _START_MARGIN
            least -= margin
            most += margin
        elif FORGETS:  # the margin keeps the sign, so that 0 as a bound holds under any decay
            least -= tl.abs(least) * _START_MARGIN
            most += tl.abs(most) * _START_MARGIN
        least += down * (1.0 + _SUM_MARGIN)
        most += up * (1.0 + _SUM_MARGIN)
        # What is NaN in d, u or the coefficients is NaN in `after`.
        doubts = leave(least, LO, HI) + leave(most, LO, HI) + leave(after, LO, HI)
        suspects = tl.sum(doubts + tl.where(up - down < float("inf"), 0.0, 1.0), axis=0)
    return after, suspects


@triton.jit
def hypergradient_scan(
    k_ptr, gates_ptr, inverse_ptr, initial_ptr, after_reset_ptr, anchor_ptr,
    start_ptr, feedback_ptr, sequential_ptr, kept_ptr, final_ptr, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, FORGETS: tl.constexpr, ANCHORED: tl.constexpr, RESETS: tl.constexpr,
    BOUNDED: tl.constexpr, LO: tl.constexpr, HI: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """All chunks of one head. PREFETCH loads the next chunk while one is computed."""
    b, p = head_index(P)
    head = b * P + p
    channel = tl.arange(0, K)
    token = tl.arange(0, C)
    d = tl.load(initial_ptr + head * K + channel)
    after_reset = tl.load(after_reset_ptr + head * K + channel)
    anchor = tl.load(anchor_ptr + head * K + channel)
    if PREFETCH:
        next_k = tile(tokens_at(k_ptr, b, p, 0, N, P, K), P, K)
        next_inverse = load_inverse(inverse_ptr, head * N)
        next_gates = load_gates(gates_ptr + head * N * ROWS * C, FORGETS)
        next_decay = load_decay(gates_ptr + head * N * ROWS * C, FORGETS)
    for n in tl.range(0, N):
        chunk = head * N + n
        keys_at = tokens_at(k_ptr, b, p, n, N, P, K)
        gates_at = gates_ptr + chunk * ROWS * C
        if PREFETCH:
            k = next_k
            inverse = next_inverse
            gates = next_gates
            decay = next_decay
            following = tl.minimum(n + 1, N - 1)
            next_k = tile(tokens_at(k_ptr, b, p, following, N, P, K), P, K)
            next_inverse = load_inverse(inverse_ptr, head * N + following)
            next_gates = load_gates(gates_ptr + (head * N + following) * ROWS * C, FORGETS)
            next_decay = load_decay(gates_ptr + (head * N + following) * ROWS * C, FORGETS)
        else:
            k = tile(keys_at, P, K)
            inverse = load_inverse(inverse_ptr, chunk)
            gates = load_gates(gates_at, FORGETS)
            decay = load_decay(gates_at, FORGETS)
        sequential = False
        if RESETS:
            d = tl.where(gate(gates_at, RESET, 0) > 0.0, after_reset, d)
            sequential = tl.max(tl.where(token > 0, gate(gates_at, RESET, token), 0.0), axis=0) > 0.0
        tl.store(start_ptr + chunk * K + channel, d)
        step, beta, before, to_end = gates
        feedback = solve(d, k, inverse, beta, before, anchor, FORGETS, ANCHORED)
        after, suspects = advance(d, k, step * feedback, to_end, decay, anchor, FORGETS, ANCHORED, BOUNDED, LO, HI)
        tl.store(feedback_ptr + chunk * C + token, feedback)
        if BOUNDED:
            if (suspects > 0.0) & (not sequential):
                tl.debug_barrier()  # the feedback is read back from memory
                count = leaves_bounds(
                    d, keys_at, feedback_ptr + chunk * C, gates_at, anchor, P, K, FORGETS, ANCHORED, LO, HI
                )
                sequential = count > 0.0
        if BOUNDED or RESETS:
            tl.store(sequential_ptr + chunk, tl.where(sequential, 1, 0))
            if sequential:
                after, feedback, first_kept, second_kept = run_tokens(
                    d, keys_at, gates_at, after_reset, anchor, P, K, FORGETS, ANCHORED, RESETS, BOUNDED, LO, HI
                )
                tl.debug_barrier()  # the feedback is written again
                tl.store(feedback_ptr + chunk * C + token, feedback)
                if BOUNDED:
                    tl.store(kept_ptr + chunk * WORDS * K + channel, first_kept)
                    tl.store(kept_ptr + (chunk * WORDS + 1) * K + channel, second_kept)
        d = after
    tl.store(final_ptr + head * K + channel, d)
