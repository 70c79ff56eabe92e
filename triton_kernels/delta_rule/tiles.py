"""Loads, stores and decays that the kernels of the delta rule share."""

import triton
import triton.language as tl

from pallas_kernels.common import token_gates

BETA = tl.constexpr(token_gates.BETA)
FROM_START = tl.constexpr(token_gates.FROM_START)
TO_END = tl.constexpr(token_gates.TO_END)
COARSE = tl.constexpr(token_gates.COARSE)
FINE = tl.constexpr(token_gates.FINE)
SEGMENT = tl.constexpr(token_gates.SEGMENT)
GATES = tl.constexpr(token_gates.GATES)


@triton.jit
def rows_at(ptr, token, head, i, column, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Return pointers [i, column] to the channels of tokens token + i of a head in an array [tokens, HEADS, SIZE].

    Only the scalar part is int64: a tile of int64 offsets takes twice the registers.
    """
    return ptr + (token * HEADS + head) * SIZE + (i[:, None] * (HEADS * SIZE) + column[None, :])


@triton.jit
def halves_at(ptr, token, head, i, column, HEADS: tl.constexpr, SIZE: tl.constexpr, HALVES: tl.constexpr):
    """Return pointers to the first part [i, column] in an array [tokens, HALVES, HEADS, SIZE].

    The second part lies HEADS * SIZE elements after it.
    """
    return ptr + (token * HALVES * HEADS + head) * SIZE + (i[:, None] * (HALVES * HEADS * SIZE) + column[None, :])


@triton.jit
def gate(gates_ptr, WHICH: tl.constexpr, i, C: tl.constexpr):
    """Return one gate of the tokens i of the chunk whose gates begin at gates_ptr."""
    return tl.load(gates_ptr + WHICH * C + i)


@triton.jit
def pair_decay(gates_ptr, i, j, C: tl.constexpr, DECAY: tl.constexpr, RESETS: tl.constexpr):
    """Return the decay [i, j] from token j to token i; 0 where j comes after i, and between segments."""
    keep = i[:, None] >= j[None, :]
    decay = tl.where(keep, 1.0, 0.0)
    if RESETS:
        same = gate(gates_ptr, SEGMENT, i, C)[:, None] == gate(gates_ptr, SEGMENT, j, C)[None, :]
        decay = tl.where(same, decay, 0.0)
    if DECAY:
        # Differences of COARSE are exact next to resets. Above the diagonal they are positive: mask before taking exp.
        sums = gate(gates_ptr, COARSE, i, C)[:, None] - gate(gates_ptr, COARSE, j, C)[None, :]
        sums += gate(gates_ptr, FINE, i, C)[:, None] - gate(gates_ptr, FINE, j, C)[None, :]
        decay *= tl.exp(tl.where(keep, sums, 0.0))
    return decay


@triton.jit
def low(x, high):
    """Return what rounding to the type of `high` took off x, in that type."""
    return (x - high.to(tl.float32)).to(high.dtype)


@triton.jit
def store_halves(at, step, x, HALVES: tl.constexpr):
    """Store float32 x at the pointers as one part or as the sum of two parts of their type, `step` elements apart."""
    high = x.to(at.dtype.element_ty)
    tl.store(at, high)
    if HALVES == 2:
        tl.store(at + step, low(x, high))
