"""The effect of the cotangents of d within each chunk that is not sequential, in parallel over all chunks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.hypergradient.chunk import (
    CHUNK,
    FORGET,
    C,
    Chunks,
    HypergradientOptions,
    chunk_index,
    gate,
    number_and_heads,
    rows,
    tokens_at,
)


class Effects(NamedTuple):
    """Results of `prepare_backward`, float32, undefined in sequential chunks."""

    d_coefficient: jax.Array  # sum_{j > i} E_ji <u_i, g_j> for token i [B, P, N, 64]
    d_start: jax.Array  # sum_j decay_j g_j [B, P, N, K]


def prepare_backward(chunks: Chunks, d_out: jax.Array, options: HypergradientOptions) -> Effects:
    """Return the effect of the cotangents g of d within the chunk.

    They add `d_coefficient` to the cotangent of step * feedback of each token, and `d_start` to that of d before the
    chunk.

    Args:
        chunks: of `scan`.
        d_out: cotangent of d, [B, T, P, K] float32, or with `options.return_write_key` of d k, in the type of k.
        options: of the kernel.
    """
    k = chunks.k
    batch, _, heads, size = k.shape
    leading = (batch, heads, chunks.number)
    chosen, constants = options.settings("hypergradient_prepare_backward", k), options.constants(k)
    found = launch(
        hypergradient_prepare_backward,
        inputs={"k_ptr": k, "gates_ptr": chunks.gates, "sequential_ptr": chunks.sequential, "d_out_ptr": d_out},
        outputs={
            "d_coefficient_ptr": jax.ShapeDtypeStruct((*leading, CHUNK), jnp.float32),
            "d_start_ptr": jax.ShapeDtypeStruct((*leading, size), jnp.float32),
        },
        scalars=number_and_heads(k),
        constants={name: constants[name] for name in ("K", "ROWS", "FORGETS")}
        | {
            "SEQUENTIAL": options.may_run_sequentially,
            "WRITE_KEY": options.return_write_key,
            "BLOCK": chosen.block,
        },
        programs=heads * chunks.number,
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    )
    return Effects(found.d_coefficient_ptr, found.d_start_ptr)


@triton.jit
def hypergradient_prepare_backward(
    k_ptr, gates_ptr, sequential_ptr, d_out_ptr, d_coefficient_ptr, d_start_ptr, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, FORGETS: tl.constexpr,
    SEQUENTIAL: tl.constexpr, WRITE_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tokens of one chunk and head, the last first; BLOCK tokens are loaded at once."""
    b, p, n = chunk_index(N, P)
    chunk = (b * P + p) * N + n
    if SEQUENTIAL:
        if tl.load(sequential_ptr + chunk) > 0:
            return
    channel = tl.arange(0, K)
    k_ptr = tokens_at(k_ptr, b, p, n, N, P, K)
    d_out_ptr = tokens_at(d_out_ptr, b, p, n, N, P, K)
    gates_ptr += chunk * ROWS * C
    cotangent = tl.zeros((K,), tl.float32)
    for done in tl.range(0, C, BLOCK, loop_unroll_factor=1):
        first = C - BLOCK - done
        keys = rows(k_ptr, first, P, K, BLOCK)
        d_outs = rows(d_out_ptr, first, P, K, BLOCK)
        for i in tl.static_range(BLOCK - 1, -1, -1):
            key = keys[i]
            g = d_outs[i]
            if WRITE_KEY:
                g = g * key
            tl.store(d_coefficient_ptr + chunk * C + first + i, tl.sum(cotangent * key * key, axis=0))
            if FORGETS:
                cotangent *= gate(gates_ptr, FORGET, first + i)
            cotangent += g
    tl.store(d_start_ptr + chunk * K + channel, cotangent)
