"""Decayed scores inside a chunk: sum over K of x_i exp(G_ij) w_j for i >= j, for scalar and channel decay.

Every exponent G_ij is the sum of the log decays over (j, i], never a difference of two long cumulative sums. That keeps
full precision next to strong decays, in values and in gradients (the adjoint is a sum over the pairs that straddle a
token), and no exponent is positive unless a log decay is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LEAF = 4

_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def inclusive_sum(x: jax.Array) -> jax.Array:
    """Sum over s <= i along the second-to-last axis, [..., C, D] -> [..., C, D]."""
    return _matmul(np.tril(np.ones((x.shape[-2],) * 2, x.dtype)), x)


def suffix_sum(x: jax.Array) -> jax.Array:
    """Sum over s > i along the second-to-last axis, [..., C, D] -> [..., C, D]."""
    return _matmul(np.triu(np.ones((x.shape[-2],) * 2, x.dtype), 1), x)


def pair_decay(log_decay: jax.Array) -> jax.Array:
    """Return exp(sum of log_decay over (j, i]) for i >= j, else 0, [..., C] -> [..., C, C]."""
    size = log_decay.shape[-1]
    lower = np.tril(np.ones((size, size), log_decay.dtype))  # [i, s]: s <= i
    upto = _lead(lower, log_decay.ndim + 1)
    exponent = _matmul(log_decay[..., None, :] * upto, np.tril(lower, -1))  # the matrix is [s, j]: s > j
    return jnp.exp(exponent) * upto


def channel_scores(x: jax.Array, w: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Compute scores with a decay per channel, by halving: one matrix product joins the two halves of every block.

    The rows of the right half decay from the middle of the block, the columns of the left half up to it, so both
    factors are at most one. Blocks of 4 are computed elementwise.

    Args:
        x: [..., M, C, K], M sets of rows (read keys, queries) that share w and the decay.
        w: [..., C, K].
        log_decay: [..., C, K].

    Returns:
        [..., M, C, C], zero above the diagonal.
    """
    size = w.shape[-2]
    padded = _LEAF
    while padded < size:
        padded *= 2
    x, w, log_decay = (_pad_rows(a, padded - size) for a in (x, w, log_decay))
    return _halved_scores(x, w, log_decay)[..., :size, :size]


def _halved_scores(x: jax.Array, w: jax.Array, log_decay: jax.Array) -> jax.Array:
    size = w.shape[-2]
    half = _LEAF
    scores = _leaf_scores(*(_split_rows(a, half) for a in (x, w, log_decay)))  # [..., M, C / half, half, half]
    while half < size:
        left_w, _ = _halves(w, half)
        left_decay, right_decay = _halves(log_decay, half)
        _, right_x = _halves(x, half)
        columns = left_w * jnp.exp(suffix_sum(left_decay))
        rows = right_x * jnp.exp(inclusive_sum(right_decay))[..., None, :, :, :]
        corner = jnp.einsum("...mnik,...njk->...mnij", rows, columns)
        pairs = scores.reshape(*scores.shape[:-3], scores.shape[-3] // 2, 2, half, half)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        bottom = jnp.concatenate([corner, second], axis=-1)
        scores = jnp.concatenate([top, bottom], axis=-2)
        half *= 2
    return scores[..., 0, :, :]


def _leaf_scores(x: jax.Array, w: jax.Array, log_decay: jax.Array) -> jax.Array:
    """Compute blocks elementwise: x [..., M, n, L, K], w and log_decay [..., n, L, K] -> [..., M, n, L, L]."""
    size = w.shape[-2]
    i, j, s = np.ogrid[:size, :size, :size]
    between = ((j < s) & (s <= i)).astype(log_decay.dtype).reshape(size * size, size)
    exponent = _matmul(between, log_decay)
    decayed = jnp.exp(exponent).reshape(*w.shape[:-2], size, size, w.shape[-1])
    decayed = decayed * w[..., None, :, :]
    scores = jnp.sum(x[..., :, None, :] * decayed[..., None, :, :, :, :], axis=-1)
    return scores * _lead(np.tril(np.ones((size, size), scores.dtype)), scores.ndim)


def _split_rows(x: jax.Array, size: int) -> jax.Array:
    return x.reshape(*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1])


def _halves(x: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    """Split every block of 2 * half rows in two, [..., C, K] -> twice [..., C / (2 half), half, K]."""
    blocks = _split_rows(x, half)
    return blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, 0)])


def _lead(x: np.ndarray, ndim: int) -> np.ndarray:
    """Add leading axes of length one, for explicit broadcasting."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
