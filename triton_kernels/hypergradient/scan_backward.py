"""The backward scan over chunks of the hypergradient preconditioner: the cotangent of its state, last chunk first.

With g the cotangents of d and l that of the state after a chunk which is not sequential,

    (I + L)^T r = step (d_coefficient + to_end <l, u>)       d_coefficient and d_start from `prepare_backward`
    l before the chunk = decay_C l + d_start - sum_j decay_j beta_j r_j u_j

where r is the cotangent of the feedback. `gradients` computes the rest from r and l, in parallel over all chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.hypergradient.chunk import (
    BETA,
    CHUNK,
    FORGET,
    RESET,
    STEP,
    WORDS,
    C,
    Chunks,
    HypergradientOptions,
    gate,
    head_index,
    number_and_heads,
    row,
    tile,
    tokens_at,
)
from triton_kernels.hypergradient.prepare_backward import Effects
from triton_kernels.hypergradient.scan import load_decay, load_gates, load_inverse
from triton_kernels.hypergradient.tokens import kept_at


class Cotangents(NamedTuple):
    """Results of `scan_backward`, float32."""

    d_feedback: jax.Array  # r [B, P, N, 64]
    d_after: jax.Array  # l, of the state after every chunk [B, P, N, K]
    d_initial: jax.Array  # [B, P, K]
    d_after_reset: jax.Array  # [B, P, K]


def scan_backward(
    chunks: Chunks,
    inverse: jax.Array,
    effects: Effects,
    d_out: jax.Array,
    d_final: jax.Array,
    options: HypergradientOptions,
) -> Cotangents:
    """Return the cotangents of the feedback and of the states.

    Args:
        chunks: of `scan`.
        inverse: of `prepare`.
        effects: of `prepare_backward`, for `d_out`.
        d_out: cotangent of d, or with `options.return_write_key` of d k.
        d_final: cotangent of the final state [B, P, K].
        options: of the kernel.
    """
    k = chunks.k
    batch, _, heads, size = k.shape
    leading = (batch, heads, chunks.number)
    chosen, constants = options.settings("hypergradient_scan_backward", k), options.constants(k)
    found = launch(
        hypergradient_scan_backward,
        inputs={
            "k_ptr": k,
            "gates_ptr": chunks.gates,
            "inverse_ptr": inverse,
            "d_coefficient_ptr": effects.d_coefficient,
            "d_start_ptr": effects.d_start,
            "sequential_ptr": chunks.sequential,
            "kept_ptr": chunks.kept,
            "d_out_ptr": d_out,
            "d_final_ptr": d_final,
        },
        outputs={
            "d_feedback_ptr": jax.ShapeDtypeStruct((*leading, CHUNK), jnp.float32),
            "d_after_ptr": jax.ShapeDtypeStruct((*leading, size), jnp.float32),
            "d_initial_ptr": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
            "d_after_reset_ptr": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        },
        scalars=number_and_heads(k),
        constants={name: constants[name] for name in ("K", "ROWS", "FORGETS", "RESETS", "BOUNDED")}
        | {"WRITE_KEY": options.return_write_key, "PREFETCH": chosen.stages > 1},
        programs=heads,
        target=options.target,
        warps=chosen.warps,
    )
    return Cotangents(found.d_feedback_ptr, found.d_after_ptr, found.d_initial_ptr, found.d_after_reset_ptr)


@triton.jit
def load_effects(d_coefficient_ptr, d_start_ptr, chunk, K: tl.constexpr):
    """Return `Effects` of a chunk."""
    d_coefficient = tl.load(d_coefficient_ptr + chunk * C + tl.arange(0, C))
    return d_coefficient, tl.load(d_start_ptr + chunk * K + tl.arange(0, K))


@triton.jit
def run_chunk_backward(cotangent, k, inverse, gates, decay, effects, FORGETS: tl.constexpr):
    """Return (the cotangent of d before a chunk, that of its feedback [64]) from that of d after it [K]."""
    step, beta, before, to_end = gates
    added, d_start = effects
    u = k.to(tl.float32)
    u *= u
    d_coefficient = tl.sum(u * cotangent[None, :], axis=1)
    if FORGETS:
        d_coefficient *= to_end
    d_feedback = tl.sum(inverse * ((d_coefficient + added) * step)[:, None], axis=0)
    weights = d_feedback * beta
    if FORGETS:
        weights *= before
        cotangent *= decay
    return cotangent + d_start - tl.sum(u * weights[:, None], axis=0), d_feedback


@triton.jit
def run_tokens_backward(
    cotangent, d_after_reset, k_ptr, d_out_ptr, gates_ptr, first_kept, second_kept, P,
    K: tl.constexpr, FORGETS: tl.constexpr, RESETS: tl.constexpr, BOUNDED: tl.constexpr, WRITE_KEY: tl.constexpr,
):  # fmt: skip
    """Return (cotangents of d before a chunk and of d after a reset, that of the feedback), token by token."""
    token = tl.arange(0, C)
    d_feedback = tl.zeros((C,), tl.float32)
    next_key = row(k_ptr, C - 1, P, K)
    next_g = row(d_out_ptr, C - 1, P, K)
    for done in tl.range(0, C, loop_unroll_factor=1):
        t = C - 1 - done
        key = next_key
        g = next_g
        next_key = row(k_ptr, tl.maximum(t - 1, 0), P, K)
        next_g = row(d_out_ptr, tl.maximum(t - 1, 0), P, K)
        u = key * key
        if WRITE_KEY:
            g *= key
        if BOUNDED:
            cotangent = kept_at(cotangent, first_kept, second_kept, t)
        found = gate(gates_ptr, STEP, t) * tl.sum(cotangent * u, axis=0)
        d_feedback = tl.where(token == t, found, d_feedback)
        if FORGETS:
            cotangent *= gate(gates_ptr, FORGET, t)
        cotangent -= (gate(gates_ptr, BETA, t) * found) * u
        cotangent += g
        if RESETS:
            reset = gate(gates_ptr, RESET, t) > 0.0
            d_after_reset += tl.where(reset, cotangent, 0.0)
            cotangent = tl.where(reset, 0.0, cotangent)
    return cotangent, d_after_reset, d_feedback


@triton.jit
def hypergradient_scan_backward(
    k_ptr, gates_ptr, inverse_ptr, d_coefficient_ptr, d_start_ptr, sequential_ptr, kept_ptr, d_out_ptr, d_final_ptr,
    d_feedback_ptr, d_after_ptr, d_initial_ptr, d_after_reset_ptr, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, FORGETS: tl.constexpr, RESETS: tl.constexpr, BOUNDED: tl.constexpr,
    WRITE_KEY: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """All chunks of one head, the last first. PREFETCH loads the next chunk while one is computed."""
    b, p = head_index(P)
    head = b * P + p
    channel = tl.arange(0, K)
    token = tl.arange(0, C)
    cotangent = tl.load(d_final_ptr + head * K + channel)
    d_after_reset = tl.zeros((K,), tl.float32)
    if PREFETCH:
        next_k = tile(tokens_at(k_ptr, b, p, N - 1, N, P, K), P, K)
        next_inverse = load_inverse(inverse_ptr, head * N + N - 1)
        next_gates = load_gates(gates_ptr + (head * N + N - 1) * ROWS * C, FORGETS)
        next_decay = load_decay(gates_ptr + (head * N + N - 1) * ROWS * C, FORGETS)
        next_effects = load_effects(d_coefficient_ptr, d_start_ptr, head * N + N - 1, K)
    for done in tl.range(0, N):
        n = N - 1 - done
        chunk = head * N + n
        keys_at = tokens_at(k_ptr, b, p, n, N, P, K)
        gates_at = gates_ptr + chunk * ROWS * C
        if PREFETCH:
            k = next_k
            inverse = next_inverse
            gates = next_gates
            decay = next_decay
            effects = next_effects
            following = tl.maximum(n - 1, 0)
            next_k = tile(tokens_at(k_ptr, b, p, following, N, P, K), P, K)
            next_inverse = load_inverse(inverse_ptr, head * N + following)
            next_gates = load_gates(gates_ptr + (head * N + following) * ROWS * C, FORGETS)
            next_decay = load_decay(gates_ptr + (head * N + following) * ROWS * C, FORGETS)
            next_effects = load_effects(d_coefficient_ptr, d_start_ptr, head * N + following, K)
        else:
            k = tile(keys_at, P, K)
            inverse = load_inverse(inverse_ptr, chunk)
            gates = load_gates(gates_at, FORGETS)
            decay = load_decay(gates_at, FORGETS)
            effects = load_effects(d_coefficient_ptr, d_start_ptr, chunk, K)
        tl.store(d_after_ptr + chunk * K + channel, cotangent)
        sequential = False
        if BOUNDED or RESETS:
            sequential = tl.load(sequential_ptr + chunk) > 0
        if sequential:
            first_kept = tl.zeros((K,), tl.int32)
            second_kept = first_kept
            if BOUNDED:
                first_kept = tl.load(kept_ptr + chunk * WORDS * K + channel)
                second_kept = tl.load(kept_ptr + (chunk * WORDS + 1) * K + channel)
            cotangent, d_after_reset, d_feedback = run_tokens_backward(
                cotangent, d_after_reset, keys_at, tokens_at(d_out_ptr, b, p, n, N, P, K), gates_at,
                first_kept, second_kept, P, K, FORGETS, RESETS, BOUNDED, WRITE_KEY,
            )  # fmt: skip
        else:
            cotangent, d_feedback = run_chunk_backward(cotangent, k, inverse, gates, decay, effects, FORGETS)
            if RESETS:
                reset = gate(gates_at, RESET, 0) > 0.0
                d_after_reset += tl.where(reset, cotangent, 0.0)
                cotangent = tl.where(reset, 0.0, cotangent)
        tl.store(d_feedback_ptr + chunk * C + token, d_feedback)
    tl.store(d_initial_ptr + head * K + channel, cotangent)
    tl.store(d_after_reset_ptr + head * K + channel, d_after_reset)
