"""Loads and stores that the kernels of the delta rule share."""

import triton
import triton.language as tl


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
