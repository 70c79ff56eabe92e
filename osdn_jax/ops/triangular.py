"""Inverse of a unit lower triangular matrix: the small system that the chunkwise delta rule solves per chunk."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_BASE = 8


@jax.custom_vjp
def unit_lower_inverse(strictly_lower: jax.Array) -> jax.Array:
    """Return (I + A)^-1 for strictly lower triangular A, by substitution in 8 x 8 blocks and then block doubling.

    Both are backward stable, even if keys are nearly parallel and A is far from small; a truncated or factored Neumann
    series is not. Products run at HIGHEST precision.

    Args:
        strictly_lower: A, [..., C, C] float32 or float64; entries on and above the diagonal must be zero.

    Returns:
        [..., C, C], unit lower triangular.
    """
    size = strictly_lower.shape[-1]
    padded = _BASE
    while padded < size:
        padded *= 2
    pad = [(0, 0)] * (strictly_lower.ndim - 2) + [(0, padded - size)] * 2
    return _inverse_by_doubling(jnp.pad(strictly_lower, pad))[..., :size, :size]


def _inverse_fwd(strictly_lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(strictly_lower)
    return inverse, inverse


def _inverse_bwd(inverse: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    transposed = inverse.swapaxes(-1, -2)
    return (-jnp.tril(_multiply(_multiply(transposed, cotangent), transposed), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)

_multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _inverse_by_doubling(lower: jax.Array) -> jax.Array:
    *batch, size, _ = lower.shape
    inverse = _inverse_by_substitution(_diagonal_blocks(lower, _BASE))
    half = _BASE
    while half < size:
        # [[a, 0], [L, b]]^-1 = [[a^-1, 0], [-b^-1 L a^-1, b^-1]], for all pairs of adjacent blocks at the same time.
        joining = _diagonal_blocks(lower, 2 * half)[..., half:, :half]
        pairs = inverse.reshape(*batch, size // (2 * half), 2, half, half)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        corner = -_multiply(second, _multiply(joining, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        bottom = jnp.concatenate([corner, second], axis=-1)
        inverse = jnp.concatenate([top, bottom], axis=-2)
        half *= 2
    return inverse.reshape(lower.shape)


def _inverse_by_substitution(lower: jax.Array) -> jax.Array:
    size = lower.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    rows = identity[..., :1, :]
    for i in range(1, size):
        # Elementwise, not a matrix product: these blocks are too small for one, and this keeps full precision.
        update = jnp.sum(lower[..., i, :i, None] * rows, axis=-2, keepdims=True)
        rows = jnp.concatenate([rows, identity[..., i : i + 1, :] - update], axis=-2)
    return rows


def _diagonal_blocks(matrix: jax.Array, size: int) -> jax.Array:
    """Take the diagonal blocks, [..., n * size, n * size] -> [..., n, size, size]."""
    count = matrix.shape[-1] // size
    blocks = [matrix[..., i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
    return jnp.stack(blocks, axis=-3)
