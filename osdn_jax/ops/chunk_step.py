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
from osdn_jax.ops.scores import channel_scores, pair_decay
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
    pair_decay: jax.Array | None  # [X, C, C]: factor on each score, apart from a decay per channel
    from_start: jax.Array | None  # [X, C]: factor on the state that a token reads
    to_end: jax.Array | None  # [X, C]: factor on the write of a token at the end of the chunk
    carry: jax.Array | None  # [X, 1 or K, 1]: factor on the state over the whole chunk


class Residuals(NamedTuple):
    """Values of `advance` that its adjoint reads."""

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
    if log_decay is not None:
        log_decay = bounded_log(log_decay)
    if log_decay is not None and log_decay.ndim == 3:
        scores = channel_scores(reads, w, log_decay)
        scores = scores if same is None else scores * same[:, None]
        before, after = _channel_decay(log_decay)
        carry = before[:, -1, :, None]
        carry = carry if first is None else carry * first[:, -1:, None]
        return Terms(reads * before[:, None], w * after, scores, same, first, last, carry)

    size = q.shape[1]
    decay: jax.Array = jnp.asarray(_lower(size, v.dtype))
    from_start, to_end = first, last
    if log_decay is not None:
        decay = pair_decay(log_decay)
        from_start, to_end = decay[:, :, 0] * jnp.exp(log_decay[:, :1]), decay[:, -1]
        if first is not None and last is not None:
            from_start, to_end = from_start * first, to_end * last
    decay = decay if same is None else decay * same
    scores = _rows_by_rows(_merged(reads), w).reshape(*reads.shape[:3], size) * decay[:, None]
    whole = None if from_start is None else from_start[:, -1:, None]
    return Terms(reads, w, scores, decay, from_start, to_end, whole)


def advance(state: jax.Array, chunk: Chunk, erase: bool) -> tuple[jax.Array, jax.Array]:
    """Advance the state [X, K, V] over a chunk: (state after it, outputs [X, C, V])."""
    terms = terms_of(chunk, erase)
    read = _read(state, terms, terms.reads)
    write = _residuals(state, chunk, terms, read[:, 0], erase).write
    out = read[:, -1] + terms.scores[:, -1] @ write
    kept = state if terms.carry is None else terms.carry * state
    return kept + _columns_by_columns(terms.writes, _scaled(write, terms.to_end)), out


def recompute(state: jax.Array, chunk: Chunk, erase: bool) -> Residuals:
    """Return the values of `advance` that its adjoint reads."""
    terms = terms_of(chunk, erase)
    return _residuals(state, chunk, terms, _read(state, terms, terms.reads[:, :1])[:, 0], erase)


def _read(state: jax.Array, terms: Terms, reads: jax.Array) -> jax.Array:
    """Return what reads [X, M, C, K] recall from the state before the chunk, [X, M, C, V]."""
    read = (_merged(reads) @ state).reshape(*reads.shape[:3], state.shape[-1])
    return read if terms.from_start is None else terms.from_start[:, None, :, None] * read


def _residuals(state: jax.Array, chunk: Chunk, terms: Terms, recalled: jax.Array, erase: bool) -> Residuals:
    beta = chunk.beta[..., None]
    if not erase:
        return Residuals(state, terms, None, chunk.v, beta * chunk.v)
    error = chunk.v - recalled
    inverse = unit_lower_inverse(beta * terms.scores[:, 0] * _lower(error.shape[1], error.dtype, -1))
    return Residuals(state, terms, inverse, error, inverse @ (beta * error))


def adjoint(
    d_state: jax.Array, d_out: jax.Array, chunk: Chunk, residuals: Residuals, erase: bool
) -> tuple[jax.Array, Chunk]:
    """Compute the cotangents of `advance`.

    Args:
        d_state: cotangent of the state after the chunk, [X, K, V].
        d_out: cotangent of the outputs, [X, C, V].
        chunk, erase: inputs of `advance`.
        residuals: those of `recompute`.

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
        # write = (I + L)^-1 target: the cotangent of target is (I + L)^-T d_write, and that of L is -d_target write^T.
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

    cotangents = (d_scores, d_reads, d_writes, d_carried * state)
    if chunk.log_decay is None or chunk.log_decay.ndim == 2:
        d_x, d_w, d_log = _adjoint_of_scores(chunk, terms, *cotangents)
    else:
        d_x, d_w, d_log = _adjoint_of_channel_scores(chunk, chunk.log_decay, terms, *cotangents)
    d_k = d_x[:, 0] if erase else jnp.zeros_like(chunk.k)
    if chunk.w is None:
        return d_before, Chunk(d_x[:, -1], d_k + d_w, None, d_v, d_beta, d_log, None)
    return d_before, Chunk(d_x[:, -1], d_k, d_w, d_v, d_beta, d_log, None)


def _adjoint_of_scores(
    chunk: Chunk, terms: Terms, d_scores: jax.Array, d_reads: jax.Array, d_writes: jax.Array, d_log_carry: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the cotangents of the reads, of the write key and of the log decay (no decay, or a scalar one)."""
    d_log = None
    if chunk.log_decay is not None:
        # Every factor is the exponential of a sum of log decays; the cotangent of that sum is factor times cotangent.
        sums = _pair_exponent_adjoint(_over_sets(d_scores * terms.scores))
        size, dtype = sums.shape[1], sums.dtype
        sums += _token_sums(_upper(size, dtype), _sum(_over_sets(d_reads * terms.reads), 2))
        sums += _token_sums(_lower(size, dtype, -1), _sum(d_writes * terms.writes, 2))
        sums += _sum(_sum(d_log_carry, 1), 1)[:, None]
        d_log = _bounded_log_adjoint(chunk.log_decay, sums)
    d_scores = _merged(_decayed(d_scores, terms))
    d_x = (d_scores @ terms.writes).reshape(d_reads.shape) + d_reads
    return d_x, _columns_by_columns(d_scores, _merged(terms.reads)) + d_writes, d_log


def _adjoint_of_channel_scores(
    chunk: Chunk,
    log_decay: jax.Array,
    terms: Terms,
    d_scores: jax.Array,
    d_reads: jax.Array,
    d_writes: jax.Array,
    d_log_carry: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the cotangents of the reads, of the write key and of the log decay (one per channel)."""
    bounded = bounded_log(log_decay)
    x = jnp.stack([chunk.k, chunk.q], axis=1) if terms.reads.shape[1] == 2 else chunk.q[:, None]
    w = chunk.k if chunk.w is None else chunk.w
    d_x, d_w, sums = jax.vjp(channel_scores, x, w, bounded)[1](_decayed(d_scores, terms))
    size, dtype = sums.shape[1], sums.dtype
    sums += _token_sums(_upper(size, dtype), _over_sets(d_reads * terms.reads))
    sums += _token_sums(_lower(size, dtype, -1), d_writes * terms.writes)
    sums += _sum(d_log_carry, 2)[:, None]
    before, after = _channel_decay(bounded)
    return d_x + d_reads * before[:, None], d_w + d_writes * after, _bounded_log_adjoint(log_decay, sums)


def _decayed(scores: jax.Array, terms: Terms) -> jax.Array:
    return scores if terms.pair_decay is None else scores * terms.pair_decay[:, None]


def _pair_exponent_adjoint(cotangent: jax.Array) -> jax.Array:
    """Return the cotangent of the log decays from that of the exponents of `pair_decay`, [X, C, C] -> [X, C].

    It sums over the pairs that straddle a token.
    """
    size, dtype = cotangent.shape[1], cotangent.dtype
    return jnp.sum(_matmul(cotangent, _upper(size, dtype, 1)[0]) * _lower(size, dtype), axis=1)


def _channel_decay(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the decays from the start of the chunk to each token and from each token to its end, twice [X, C, K]."""
    size, dtype = log_decay.shape[1], log_decay.dtype
    before, after = (_token_sums(weights, log_decay) for weights in (_lower(size, dtype), _upper(size, dtype, 1)))
    return jnp.exp(before), jnp.exp(after)


def _token_sums(weights: np.ndarray, x: jax.Array) -> jax.Array:
    """Return sum_s weights[0, i, s] x_s, [X, C] or [X, C, K] -> the same."""
    if x.ndim == 2:
        return _matmul(x, weights[0].T)
    return _matmul(jnp.broadcast_to(weights, (len(x), *weights.shape[1:])), x)


def _over_sets(x: jax.Array) -> jax.Array:
    """Sum over the sets of reads, [X, M, ...] -> [X, ...]; XLA is slower with a reduction of one or two terms."""
    return x[:, 0] if x.shape[1] == 1 else x[:, 0] + x[:, 1]


def _sum(x: jax.Array, axis: int) -> jax.Array:
    """Sum over an axis; without the barrier XLA would compute a sum again for every element that reads it."""
    return lax.optimization_barrier(jnp.sum(x, axis=axis))


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
