"""Operations on tiles that several kernels share: products of float32 matrices, inverses, sums over tokens.

`PRECISION` is the `input_precision` of products of float32 matrices: tf32x3 for float32 inputs (about 21 bits),
bf16x3 for 16-bit ones (about 16 bits). Products of 16-bit matrices are exact, with float32 sums.
"""

import jax.numpy as jnp
import triton
import triton.language as tl


def precision_of(dtype: jnp.dtype) -> str:
    """Return the precision of products of float32 matrices in a kernel whose inputs have this type."""
    return "tf32x3" if jnp.dtype(dtype).itemsize == 4 else "bf16x3"


def bits_of(dtype: jnp.dtype) -> int:
    """Return the bits of a type, by which the table of settings is keyed."""
    return 8 * jnp.dtype(dtype).itemsize


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a b, float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(a, PRECISION: tl.constexpr):
    """Return (I + a)^-1 of a strictly lower triangular a [32, 32] by doubling blocks, in a loop that stays a loop.

    Of larger matrices, or unrolled, the products spill and take minutes to compile.
    """
    i = tl.arange(0, 32)[:, None]
    j = tl.arange(0, 32)[None, :]
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, a, 0.0)
    for level in tl.range(1, 5, loop_unroll_factor=1, num_stages=1):
        # [[p, 0], [m, r]]^-1 = [[p^-1, 0], [-r^-1 m p^-1, r^-1]] for all pairs of neighbouring blocks at once.
        m = tl.where((i >> (level + 1) == j >> (level + 1)) & (i >> level != j >> level), a, 0.0)
        x -= product(x, product(m, x, PRECISION), PRECISION)
    return x


@triton.jit
def sum_tokens(mask, x, PARTS: tl.constexpr):
    """Return mask @ x for a mask of zeros and ones in bfloat16, and float32 x in PARTS bfloat16 parts of 8 bits."""
    part = x.to(tl.bfloat16)
    total = tl.dot(mask, part)
    for _ in tl.static_range(PARTS - 1):
        x -= part.to(tl.float32)
        part = x.to(tl.bfloat16)
        total = tl.dot(mask, part, total)
    return total
