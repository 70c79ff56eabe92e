"""One chunk of the delta rule and its adjoint, as a few batched matrix products.

The notation is that of docs/mathematics.md. X counts independent heads: value heads times rows of the batch. Products
are written with the contracted axis last on the left wherever possible, since XLA is slow on a CPU where it is not.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from osdn_jax.ops.checks import bounded_log
from osdn_jax.ops.scores import channel_scores
from osdn_jax.ops.triangular import unit_lower_inverse


class Chunk(NamedTuple):
    """Inputs of one chunk, or their cotangents; optional ones are None."""

    q: jax.Array  # scaled [X, C, K]
    k: jax.Array  # [X, C, K]
    w: jax.Array | None  # write key [X, C, K]; None means k
    v: jax.Array  # [X, C, V]
    beta: jax.Array  # [X, C]
    log_decay: jax.Array | None  # [X, C], or [X, C, K]
    segment: jax.Array | None  # [X, C] int32: number of resets since the start of the chunk


class Terms(NamedTuple):
    """Terms of a chunk that do not depend on the state; M is 2 (k, q) if the rule erases, else 1 (q)."""

    reads: jax.Array  # [X, M, C, K], decayed from the start of the chunk if the decay is per channel
    writes: jax.Array  # [X, C, K], decayed to the end of the chunk if the decay is per channel
    scores: jax.Array  # [X, M, C, C], lower triangular
    pair_decay: jax.Array | None  # [X, C, C]: factor on each score, without a decay per channel
    from_start: jax.Array | None  # [X, C]: factor on the state that a token reads
    to_end: jax.Array | None  # [X, C]: factor on the write of a token at the end of the chunk
    carry: jax.Array | None  # [X, 1 or K, 1]: factor on the state over the whole chunk


class Residuals(NamedTuple):
    """Values of the forward computation that the adjoint reads."""

    state: jax.Array  # before the chunk [X, K, V]
    terms: Terms
    inverse: jax.Array | None  # (I + diag(beta) A)^-1 [X, C, C]
    error: jax.Array  # v minus what the state recalls [X, C, V]
    write: jax.Array  # [X, C, V]


def terms_of(chunk: Chunk, erase: bool) -> Terms:
    """Compute the terms of a chunk that do not depend on the state."""
    q, k, w, v, _, log_decay, segment = chunk
    w = k if w is None else w
    reads = jnp.stack([k, q], axis=1) if erase else q[:, None]
    same = first = last = None
    if segment is not None:
        same = (segment[:, :, None] == segment[:, None, :]).astype(v.dtype)
        first = (segment == 0).astype(v.dtype)
        last = (segment == segment[:, -1:]).astype(v.dtype)
    if log_decay is not None and log_decay.ndim == 3:
        scores = channel_scores(reads, w, bounded_log(log_decay))
        scores = scores if same is None else scores * same[:, None]
        before, after = _channel_decay(log_decay)
        carry = before[:, -1, :, None]
        carry = carry if first is None else carry * first[:, -1:, None]
        return Terms(reads * before[:, None], w * after, scores, None, first, last, carry)

    size = q.shape[1]
    scores = _rows_by_rows(_merged(reads), w).reshape(*reads.shape[:3], size)
    if log_decay is None:
        decay = jnp.broadcast_to(_lower(size, v.dtype), (1, size, size))
        from_start, to_end = first, last
    else:
        decay = jnp.exp(_pair_exponent(bounded_log(log_decay))) * _lower(size, v.dtype)
        from_start = decay[:, :, 0] * jnp.exp(bounded_log(log_decay[:, :1]))
        to_end = decay[:, -1]
        if first is not None and last is not None:
            from_start, to_end = from_start * first, to_end * last
    decay = decay if same is None else decay * same
    carry = None if from_start is None else from_start[:, -1:, None]
    return Terms(reads, w, scores * decay[:, None], decay, from_start, to_end, carry)


def advance(
    state: jax.Array, chunk: Chunk, erase: bool
) -> tuple[jax.Array, jax.Array, Residuals]:
    """Advance the state [X, K, V] over a chunk: (state after it, outputs [X, C, V], residuals of the adjoint)."""
    residuals, read = _write(state, chunk, erase)
    terms, write = residuals.terms, residuals.write
    out = read + terms.scores[:, -1] @ write
    write = _scaled(write, terms.to_end)
    kept = state if terms.carry is None else terms.carry * state
    return kept + _columns_by_columns(terms.writes, write), out, residuals


def recompute(state: jax.Array, chunk: Chunk, erase: bool) -> Residuals:
    """Return the residuals of `advance`."""
    return _write(state, chunk, erase)[0]


def _write(state: jax.Array, chunk: Chunk, erase: bool) -> tuple[Residuals, jax.Array]:
    """Return (residuals, what the queries read from the state [X, C, V])."""
    terms = terms_of(chunk, erase)
    size, value_dim = chunk.v.shape[1:]
    read = (_merged(terms.reads) @ state).reshape(len(state), -1, size, value_dim)
    if terms.from_start is not None:
        read = terms.from_start[:, None, :, None] * read
    if not erase:
        return Residuals(state, terms, None, chunk.v, chunk.beta[..., None] * chunk.v), read[:, -1]
    error = chunk.v - read[:, 0]
    inverse = unit_lower_inverse(chunk.beta[..., None] * terms.scores[:, 0] * _lower(size, error.dtype, -1))
    write = inverse @ (chunk.beta[..., None] * error)
    return Residuals(state, terms, inverse, error, write), read[:, -1]


def adjoint(
    d_state: jax.Array, d_out: jax.Array, chunk: Chunk, residuals: Residuals, erase: bool
) -> tuple[jax.Array, Chunk]:
    """Compute the cotangents of `advance`.

    Args:
        d_state: cotangent of the state after the chunk, [X, K, V].
        d_out: cotangent of the outputs, [X, C, V].
        chunk, erase: inputs of `advance`.
        residuals: its residuals.

    Returns:
        (cotangent of the state before the chunk, cotangents of the chunk).
    """
    state, terms, inverse, error, write = residuals
    beta = chunk.beta[..., None]
    size, dtype = d_out.shape[1], d_out.dtype
    d_write = _columns_by_columns(terms.scores[:, -1], d_out) + _scaled(terms.writes @ d_state, terms.to_end)
    if inverse is None:
        d_v, d_beta = beta * d_write, jnp.sum(d_write * error, axis=-1)
        d_read = d_out
        d_scores = _rows_by_rows(d_read, write)[:, None]
    else:
        # write = (I + L)^-1 target, so the cotangent of target is (I + L)^-T d_write and that of L is -d_target write^T.
        d_target = _columns_by_columns(inverse, d_write)
        d_v = beta * d_target
        d_read = jnp.concatenate([-d_target, d_out], axis=1)
        d_scores = _rows_by_rows(d_read, write).reshape(len(d_read), 2, size, size)
        d_lower = d_scores[:, 0] * _lower(size, dtype, -1)
        d_beta = jnp.sum(d_target * error, axis=-1) + jnp.sum(d_lower * terms.scores[:, 0], axis=-1)
        d_scores = jnp.stack([beta * d_lower, d_scores[:, 1]], axis=1)
        d_read = jnp.concatenate([-d_v, d_out], axis=1)
    if terms.from_start is not None:
        from_start = jnp.tile(terms.from_start, (1, terms.reads.shape[1]))
        d_read = from_start[..., None] * d_read
    reads = _merged(terms.reads)
    d_reads = _rows_by_rows(d_read, state).reshape(terms.reads.shape)
    d_writes = _rows_by_rows(_scaled(write, terms.to_end), d_state)
    d_carried = d_state if terms.carry is None else terms.carry * d_state
    d_before = d_carried + _columns_by_columns(reads, d_read)

    if terms.pair_decay is None:
        d_x, d_w, d_log = _adjoint_of_channel_decay(chunk, terms, d_scores, d_reads, d_writes, d_carried * state)
    else:
        d_x, d_w, d_log = _adjoint_of_pair_decay(chunk, terms, d_scores, d_reads, d_writes, d_carried * state)
    d_k = d_x[:, 0] if erase else jnp.zeros_like(chunk.k)
    if chunk.w is None:
        d_k, d_w = d_k + d_w, None
    return d_before, Chunk(d_x[:, -1], d_k, d_w, d_v, d_beta, d_log, None)


def _adjoint_of_pair_decay(
    chunk: Chunk, terms: Terms, d_scores: jax.Array, d_reads: jax.Array, d_writes: jax.Array, d_log_carry: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the cotangents of the reads, of the write key and of the log decay (no decay, or a scalar one)."""
    d_log = None
    if chunk.log_decay is not None:
        # Every factor is the exponential of a sum of log decays; the cotangent of that sum is factor times cotangent.
        d_log = _pair_exponent_adjoint(jnp.sum(d_scores * terms.scores, axis=1))
        d_log += _token_sums(_upper(d_log.shape[1], d_log.dtype), jnp.sum(d_reads * terms.reads, axis=(1, 3)))
        d_log += _token_sums(_lower(d_log.shape[1], d_log.dtype, -1), jnp.sum(d_writes * terms.writes, axis=-1))
        d_log += jnp.sum(d_log_carry, axis=(1, 2))[:, None]
        d_log = _bounded_log_adjoint(chunk.log_decay, d_log)
    d_scores = _merged(d_scores * terms.pair_decay[:, None])
    d_x = (d_scores @ terms.writes).reshape(d_reads.shape) + d_reads
    return d_x, _columns_by_columns(d_scores, _merged(terms.reads)) + d_writes, d_log


def _adjoint_of_channel_decay(
    chunk: Chunk, terms: Terms, d_scores: jax.Array, d_reads: jax.Array, d_writes: jax.Array, d_log_carry: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cotangents of the reads, of the write key and of the log decay (a decay per channel)."""
    if chunk.segment is not None:
        d_scores = d_scores * (chunk.segment[:, None, :, None] == chunk.segment[:, None, None, :])
    x = jnp.stack([chunk.k, chunk.q], axis=1) if terms.reads.shape[1] == 2 else chunk.q[:, None]
    w = chunk.k if chunk.w is None else chunk.w
    log_decay = bounded_log(chunk.log_decay)
    d_x, d_w, d_log = jax.vjp(channel_scores, x, w, log_decay)[1](d_scores)
    before, after = _channel_decay(log_decay)
    size, dtype = d_log.shape[1], d_log.dtype
    d_log += _token_sums(_upper(size, dtype), jnp.sum(d_reads * terms.reads, axis=1))
    d_log += _token_sums(_lower(size, dtype, -1), d_writes * terms.writes)
    d_log += jnp.sum(d_log_carry, axis=-1)[:, None]
    d_log = _bounded_log_adjoint(chunk.log_decay, d_log)
    return d_x + d_reads * before[:, None], d_w + d_writes * after, d_log


def _pair_exponent(log_decay: jax.Array) -> jax.Array:
    """Return the sums of log decays over (j, i], [X, C] -> [X, C, C]; those for j > i are meaningless."""
    size, dtype = log_decay.shape[1], log_decay.dtype
    return _matmul(log_decay[:, None] * _lower(size, dtype), _lower(size, dtype, -1)[0])


def _pair_exponent_adjoint(cotangent: jax.Array) -> jax.Array:
    """Return the cotangent of the log decays, [X, C, C] -> [X, C]: sums over the pairs that straddle a token."""
    size, dtype = cotangent.shape[1], cotangent.dtype
    return jnp.sum(_matmul(cotangent, _upper(size, dtype, 1)[0]) * _lower(size, dtype), axis=1)


def _channel_decay(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the decays from the start of the chunk to each token and from each token to its end, twice [X, C, K]."""
    size, dtype = log_decay.shape[1], log_decay.dtype
    log_decay = bounded_log(log_decay)
    return tuple(jnp.exp(_token_sums(m, log_decay)) for m in (_lower(size, dtype), _upper(size, dtype, 1)))


def _token_sums(weights: np.ndarray, x: jax.Array) -> jax.Array:
    """Return sum_s weights[0, i, s] x_s, [X, C] or [X, C, K] -> the same."""
    if x.ndim == 2:
        return _matmul(x, weights[0].T)
    return _matmul(jnp.broadcast_to(weights, (len(x), *weights.shape[1:])), x)


def _bounded_log_adjoint(log_decay: jax.Array, cotangent: jax.Array) -> jax.Array:
    return jax.vjp(bounded_log, log_decay)[1](cotangent)[0]


def _lower(size: int, dtype: jnp.dtype, diagonal: int = 0) -> np.ndarray:
    return np.tril(np.ones((1, size, size), dtype), diagonal)


def _upper(size: int, dtype: jnp.dtype, diagonal: int = 0) -> np.ndarray:
    return np.triu(np.ones((1, size, size), dtype), diagonal)


def _merged(x: jax.Array) -> jax.Array:
    """Merge the axes of sets and tokens, [X, M, C, D] -> [X, M C, D]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _scaled(x: jax.Array, by: jax.Array | None) -> jax.Array:
    return x if by is None else by[..., None] * x


def _rows_by_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a b^T, [X, m, n], [X, l, n] -> [X, m, l]."""
    return lax.dot_general(a, b, (((2,), (2,)), ((0,), (0,))))


def _columns_by_columns(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return a^T b, [X, n, m], [X, n, l] -> [X, m, l]."""
    return lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))))


_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
