"""The Gram preconditioner in Triton: its multipliers or write keys, their gradients, and its limits.

One program per batch row, head and block of key channels scans chunks of 32 tokens with the running sum A in registers;
the gradient scans them backward. Inside a chunk A is a matrix product with the decays of all pairs of tokens. A long
sequence of few heads is split: a first pass finds the A that each split starts from.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.delta_rule_inputs import Splits
from pallas_kernels.common.partitioning import Heads, per_shard
from pallas_kernels.common.shard_map import match_varying_axes
from pallas_kernels.common.token_gates import FROM_START, clamped, from_chunks, gates_of, segments_of
from triton_kernels.common.target import Target
from triton_kernels.delta_rule.split_sequence import split_count
from triton_kernels.gram.chunk import CHUNK, Chunks, GramOptions, settings_of
from triton_kernels.gram.scan import scan
from triton_kernels.gram.scan_backward import D_CENTER, D_GAIN, D_LOG_DECAY, scan_backward

DIMENSIONS = (32, 64, 128, 256)
_AXES = ("b.k.", "b.k", "b.k", "bk")  # of k, log_decay, gain and center, for `per_shard`


def limitation(k: jax.Array, log_decay: jax.Array) -> str | None:
    """Return why the kernels cannot serve keys [B, T, P, K], None if they can."""
    if k.shape[-1] not in DIMENSIONS:
        return f"k: got {k.shape[-1]} channels, the kernels take 32, 64, 128 or 256"
    if k.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"k: got {k.dtype}, the kernels take bfloat16, float16 or float32"
    if log_decay.dtype != jnp.float32:
        return f"log_decay: got {log_decay.dtype}, the kernels keep float32"
    return None


def chunk_size(dtype: Any, key_dim: int) -> int:
    """Return the tokens of a chunk: 32 for every type and head dimension."""
    del dtype, key_dim
    return CHUNK


def gram(
    k: jax.Array,
    log_decay: jax.Array,
    gain: jax.Array,
    center: jax.Array,
    squash: float,
    initial: jax.Array,
    resets: jax.Array | None,
    *,
    return_write_key: bool = False,
    splits: int | None = None,
    target: Target,
) -> tuple[jax.Array, jax.Array]:
    """Return the multipliers m, or the write keys m k, and the running sum A of squared keys after the last token.

        A_t = exp(log_decay_t) A_{t-1} + gain_t k_t^2
        m_t = exp(-log(squash) r / (1 + |r|)),    r = log(A_t + 1e-6) - center

    Args:
        k: [B, T, P, K] bfloat16, float16 or float32, K of 32, 64, 128 or 256; any T.
        log_decay: [B, T, P] float32.
        gain: [B, T, P] float32.
        center: [P] float32.
        squash: the largest multiplier; the smallest is its inverse.
        initial: A before the first token [B, P, K] float32.
        resets: [B, T] bool; True resets A to zeros before that token. None means no resets.
        return_write_key: return the write keys m k, in the type of k, instead of m, in float32; default False.
        splits: number of splits of the sequence that run in parallel; default: enough to fill the GPU if heads are few.
        target: what the kernels run on.

    Returns:
        (m or m k [B, T, P, K], A after the last token [B, P, K] float32).

    Raises:
        NotImplementedError: the kernels do not serve these keys; see `limitation`.
    """
    reason = limitation(k, log_decay)
    if reason is not None:
        raise NotImplementedError(reason)
    if 0 in k.shape[:3]:
        return jnp.zeros(k.shape, k.dtype if return_write_key else jnp.float32), initial
    center = jnp.broadcast_to(center, (k.shape[0], k.shape[2]))
    options = GramOptions(float(squash), return_write_key, resets is not None, target, splits)
    return _gram(*match_varying_axes((k, clamped(log_decay), gain, center, initial, resets)), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _gram(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    out, final = _per_shard(_forward, arguments[:-1], (), ("b.k.", "bk."), arguments[-1])
    return out, final


def _gram_fwd(*arguments: Any) -> Any:
    *arrays, options = arguments
    out, final, start = _per_shard(_forward_and_states, arrays, (), ("b.k.", "bk.", "b.k."), options)
    return (out, final), (*arrays, start)


def _gram_bwd(options: GramOptions, saved: Any, cotangents: Any) -> Any:
    *arrays, start = saved
    results = ("b.k.", "b.k", "b.k", "bk", "bk.")
    return *_per_shard(_backward, arrays, (start, *cotangents), results, options), None


_gram.defvjp(_gram_fwd, _gram_bwd)


def _per_shard(function: Any, arrays: Any, more: Any, results: Any, options: GramOptions) -> list[jax.Array]:
    axes = (*_AXES, "bk.", None if arrays[-1] is None else "b.", *("b.k.", "b.k.", "bk.")[: len(more)])
    heads = Heads(arrays[0].shape[2])
    interpret = options.target.interpret
    return per_shard(function, (*arrays, *more), axes, results, options, heads=heads, interpret=interpret)


def _cut(arrays: Any, options: GramOptions) -> tuple[Splits, Chunks]:
    """Return the splits of the sequences, and the inputs of the kernels cut into them."""
    k, log_decay, gain, center, _, resets = arrays[:6]
    batch, length, heads, key_dim = k.shape
    count = options.splits
    if count is None:
        blocks = key_dim // settings_of("gram_scan", k, options).block
        count = split_count(batch, heads, -(-length // CHUNK), blocks)
    splits = Splits(count, batch, length, CHUNK)
    segment = None if resets is None else segments_of(splits.cut(resets), CHUNK)
    gates = gates_of(splits.cut(gain), splits.cut(log_decay), segment, CHUNK).swapaxes(1, 2)
    return splits, Chunks(splits.cut(k), gates, jnp.repeat(center, count, axis=0))


def _forward(arrays: Any, options: GramOptions) -> list[jax.Array]:
    """Return [m or m k, A after the last token]."""
    splits, chunks = _cut(arrays, options)
    found = scan(chunks, _initial(arrays[4], splits, chunks, options), options, keep="outputs")
    return [splits.join(found.out_ptr), splits.last(found.final_ptr)]


def _forward_and_states(arrays: Any, options: GramOptions) -> list[jax.Array]:
    """Return [m or m k, A after the last token, A before each chunk [B, N, P, K]]."""
    splits, chunks = _cut(arrays, options)
    found = scan(chunks, _initial(arrays[4], splits, chunks, options), options, keep="outputs, states")
    start = _by_chunk(splits).join(found.start_ptr)  # of chunks with tokens: the same number for any splits
    return [splits.join(found.out_ptr), splits.last(found.final_ptr), start]


def _backward(arrays: Any, options: GramOptions) -> list[jax.Array]:
    """Return the gradients of k, log_decay, gain, the center [B, P] and the initial A."""
    start, d_out, d_final = arrays[6:]
    splits, chunks = _cut(arrays, options)
    start, d_out = _by_chunk(splits).cut(start), splits.cut(d_out)
    if splits.number > 1:
        zeros = jnp.zeros((splits.batch * splits.number, *d_final.shape[1:]), jnp.float32)
        from_zeros = scan_backward(chunks, start, d_out, zeros, options, keep="initial").d_initial_ptr
        d_final = _chain(splits, chunks, from_zeros, d_final, reverse=True)
    found = scan_backward(chunks, start, d_out, d_final, options, keep="gradients")
    sums = jnp.sum(found.sums_ptr, axis=3)  # over the blocks of channels
    d_log_decay, d_gain = (splits.join(from_chunks(sums[..., x, :].swapaxes(1, 2))) for x in (D_LOG_DECAY, D_GAIN))
    d_center = jnp.sum(sums[..., D_CENTER, :], axis=(1, 3)).reshape(splits.batch, splits.number, -1).sum(axis=1)
    return [splits.join(found.d_k_ptr), d_log_decay, d_gain, d_center, splits.first(found.d_initial_ptr)]


def _by_chunk(splits: Splits) -> Splits:
    """Return the splits of arrays with an axis of chunks in place of tokens."""
    return splits._replace(length=-(-splits.length // CHUNK), chunk=1)


def _initial(initial: jax.Array, splits: Splits, chunks: Chunks, options: GramOptions) -> jax.Array:
    """Return A before each split [B S, P, K]."""
    if splits.number == 1:
        return initial
    zeros = jnp.zeros((splits.batch * splits.number, *initial.shape[1:]), jnp.float32)
    return _chain(splits, chunks, scan(chunks, zeros, options, keep="final").final_ptr, initial)


def _chain(splits: Splits, chunks: Chunks, added: jax.Array, first: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Return x before each split [B S, P, K], for x' = decay x + added of a split; in reverse order if asked.

    Args:
        splits: of the sequences.
        chunks: of the splits.
        added: of each split [B S, P, K].
        first: x before the first split, in reverse order before the last [B, P, K].
        reverse: from the last split to the first.
    """
    count = splits.number
    decay = jnp.prod(chunks.gates[..., FROM_START, -1], axis=1).reshape(splits.batch, count, -1)
    added = added.reshape(splits.batch, count, *added.shape[1:])
    if reverse:
        decay, added = decay[:, ::-1], added[:, ::-1]
    # The decay from the end of split j to the start of split i: the product over the splits between them.
    i, j, between = (lax.broadcasted_iota(jnp.int32, (count, count, count), axis) for axis in range(3))
    factors = jnp.where(((between > j) & (between < i))[None, ..., None], decay[:, None, None], 1.0)
    weights = jnp.where((i > j)[None, :, :, 0, None], jnp.prod(factors, axis=3), 0.0)
    carried = jnp.where((between < i)[None, :, 0, :, None], decay[:, None], 1.0).prod(axis=2)
    x = jnp.einsum("bijp,bjpk->bipk", weights, added, precision=lax.Precision.HIGHEST)
    x = x + carried[..., None] * first[:, None]
    return (x[:, ::-1] if reverse else x).reshape(-1, *first.shape[1:])
