"""(I + L)^-1 of every chunk, which needs no state, in parallel."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from triton_kernels.common.launch import launch
from triton_kernels.common.tiles import precision_of, product, unit_lower_inverse
from triton_kernels.hypergradient.chunk import (
    BETA,
    CHUNK,
    COARSE,
    FINE,
    STEP,
    C,
    HypergradientOptions,
    chunk_index,
    gate,
    number_and_heads,
    tokens_at,
)


def prepare(k: jax.Array, gates: jax.Array, options: HypergradientOptions) -> jax.Array:
    """Return (I + L)^-1 [B, P, N, 64, 64] float32; of the blocks of 32, the upper right one is undefined.

    Args:
        k: [B, T, P, K], T a multiple of 64.
        gates: [B, P, N, rows, 64].
        options: of the kernel.
    """
    batch, _, heads, _ = k.shape
    chosen, constants = options.settings("hypergradient_prepare", k), options.constants(k)
    return launch(
        hypergradient_prepare,
        inputs={"k_ptr": k, "gates_ptr": gates},
        outputs={"inverse_ptr": jax.ShapeDtypeStruct((batch, heads, gates.shape[2], CHUNK, CHUNK), jnp.float32)},
        scalars=number_and_heads(k),
        constants={name: constants[name] for name in ("K", "ROWS", "FORGETS")}
        | {"BLOCK": chosen.block, "PRECISION": precision_of(k.dtype)},
        programs=heads * gates.shape[2],
        target=options.target,
        warps=chosen.warps,
        stages=chosen.stages,
    ).inverse_ptr


@triton.jit
def squares(k_ptr, first, begin, P, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return u of 32 tokens of a chunk, from the first on, and BLOCK channels."""
    token = first + tl.arange(0, 32)
    k = tl.load(k_ptr + token[:, None] * P * K + begin + tl.arange(0, BLOCK)[None, :]).to(tl.float32)
    return k * k


@triton.jit
def coupling(overlap, gates_ptr, i, j, FORGETS: tl.constexpr):
    """Return the block of L with tokens i in rows and j in columns from that of <u_i, u_j>."""
    below = i[:, None] > j[None, :]
    found = overlap * gate(gates_ptr, BETA, i)[:, None] * gate(gates_ptr, STEP, j)[None, :]
    if FORGETS:
        before = tl.load(gates_ptr + COARSE * C + i - 1, mask=i > 0, other=0.0)
        total = before[:, None] - gate(gates_ptr, COARSE, j)[None, :]
        before = tl.load(gates_ptr + FINE * C + i - 1, mask=i > 0, other=0.0)
        total += before[:, None] - gate(gates_ptr, FINE, j)[None, :]
        found *= tl.exp(tl.where(below, total, 0.0))
    return tl.where(below, found, 0.0)


@triton.jit
def hypergradient_prepare(
    k_ptr, gates_ptr, inverse_ptr, N, P,
    K: tl.constexpr, ROWS: tl.constexpr, FORGETS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(I + L)^-1 of one chunk and head, in blocks of 32 tokens: products of larger float32 matrices spill."""
    b, p, n = chunk_index(N, P)
    chunk = (b * P + p) * N + n
    k_ptr = tokens_at(k_ptr, b, p, n, N, P, K)
    gates_ptr += chunk * ROWS * C
    first = tl.arange(0, 32)
    second = 32 + first
    upper = tl.zeros((32, 32), tl.float32)
    cross = tl.zeros((32, 32), tl.float32)
    lower = tl.zeros((32, 32), tl.float32)
    for begin in tl.range(0, K, BLOCK, loop_unroll_factor=1):
        u = squares(k_ptr, 0, begin, P, K, BLOCK)
        v = squares(k_ptr, 32, begin, P, K, BLOCK)
        upper += product(u, tl.trans(u), PRECISION)
        cross += product(v, tl.trans(u), PRECISION)
        lower += product(v, tl.trans(v), PRECISION)
    inverse_ptr += chunk * C * C + first[:, None] * C + first[None, :]
    upper = unit_lower_inverse(coupling(upper, gates_ptr, first, first, FORGETS), PRECISION)
    tl.store(inverse_ptr, upper)
    lower = unit_lower_inverse(coupling(lower, gates_ptr, second, second, FORGETS), PRECISION)
    tl.store(inverse_ptr + 32 * C + 32, lower)
    cross = product(coupling(cross, gates_ptr, second, first, FORGETS), upper, PRECISION)
    tl.store(inverse_ptr + 32 * C, -product(lower, cross, PRECISION))
