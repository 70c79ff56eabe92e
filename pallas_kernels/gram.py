"""The Gram preconditioner of Preconditioned DeltaNet on Hopper GPUs: its multipliers, or the write keys.

One block per batch, head and 64 key channels scans the chunks of 64 tokens with the running sum A in registers; the
gradient scans them backward. Inside a chunk A is a matrix product with the decays of all pairs of tokens, to about
float32 precision.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import pair_decay, pair_rows_of, pair_rows_tile
from pallas_kernels.common.launch import BlockIndex, launch
from pallas_kernels.common.partitioning import Heads, per_shard
from pallas_kernels.common.shard_map import match_varying_axes
from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
    along_rows,
    column_scale,
    indices,
    opaque_addresses,
    products,
    read,
    read_global_columns,
    row_scale,
    smem,
    split,
    split_terms,
)
from pallas_kernels.common.token_gates import (
    BETA,
    FROM_START,
    GATES,
    TO_END,
    clamped,
    from_chunks,
    gates_of,
    pad_to_multiple,
    segments_of,
)

_EPSILON = 1e-6
_SIZES = (64, 128, 256)
_GAIN = BETA  # the row of the gates that holds the gain

# Rows of the sums over key channels of the gradient, [_SUMS, 64] float32.
_D_GAIN, _D_LOG_DECAY, _D_CENTER = range(3)
_SUMS = 3

_AXES = ("b.k.", "b.k", "b.k", "k")  # of k, log_decay, gain and center, for `per_shard`


class GramOptions(NamedTuple):
    """Options that are fixed when a kernel is built."""

    squash: float
    return_write_key: bool  # return write keys, in the type of k, instead of multipliers in float32
    resets: bool
    interpret: bool


def limitation(k: jax.Array, log_decay: jax.Array) -> str | None:
    """Return why the kernels cannot serve keys [B, T, P, K], None if they can."""
    if k.shape[-1] not in _SIZES:
        return f"k: got {k.shape[-1]} channels, the kernels take 64, 128 or 256"
    if k.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"k: got {k.dtype}, the kernels take bfloat16, float16 or float32"
    if log_decay.dtype != jnp.float32:
        return f"log_decay: got {log_decay.dtype}, the kernels keep float32"
    return None


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the multipliers m, or the write keys m k, and the running sum A of squared keys after the last token.

        A_t = exp(log_decay_t) A_{t-1} + gain_t k_t^2
        m_t = exp(-log(squash) r / (1 + |r|)),    r = log(A_t + 1e-6) - center

    Args:
        k: [B, T, P, K] bfloat16, float16 or float32, K of 64, 128 or 256; any T.
        log_decay: [B, T, P] float32.
        gain: [B, T, P] float32.
        center: [P] float32.
        squash: the largest multiplier; the smallest is its inverse.
        initial: A before the first token [B, P, K] float32.
        resets: [B, T] bool; True resets A to zeros before that token. None means no resets.
        return_write_key: return the write keys m k, in the type of k, instead of m, in float32; default False.
        interpret: run in the interpreter, on any machine, and detect races; default False.

    Returns:
        (m or m k [B, T, P, K], A after the last token [B, P, K] float32).

    Raises:
        NotImplementedError: the kernels do not serve these keys; see `limitation`.
    """
    reason = limitation(k, log_decay)
    if reason is not None:
        raise NotImplementedError(reason)
    length = k.shape[1]
    if 0 in k.shape[:3]:
        return jnp.zeros(k.shape, k.dtype if return_write_key else jnp.float32), initial

    segment = None if resets is None else segments_of(pad_to_multiple(resets))
    options = GramOptions(squash, return_write_key, resets=segment is not None, interpret=interpret)
    tokens = (pad_to_multiple(k), pad_to_multiple(clamped(log_decay)), pad_to_multiple(gain))
    out, final = _gram(*match_varying_axes((*tokens, center, initial, segment)), options)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _gram(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return _gram_fwd(*arguments)[0]


def _gram_fwd(*arguments: Any) -> Any:
    *arrays, options = arguments
    axes = (*_AXES, "bk.", _segment_axes(arrays[-1]))
    results = ("b.k.", "bk.", "bk..")
    heads = Heads(arrays[0].shape[2])
    out, final, start = per_shard(
        _scan, tuple(arrays), axes, results, options, heads=heads, interpret=options.interpret
    )
    return (out, final), (*arrays, start)


def _gram_bwd(options: GramOptions, saved: Any, cotangents: Any) -> Any:
    k, log_decay, gain, center, _, segment, start = saved
    arrays = (k, log_decay, gain, center, segment, start, *cotangents)
    axes = (*_AXES, _segment_axes(segment), "bk..", "b.k.", "bk.")
    results = ("b.k.", "b.k", "b.k", "bk", "bk.")
    heads = Heads(k.shape[2])
    *d_tokens, d_center, d_initial = per_shard(
        _scan_backward, arrays, axes, results, options, heads=heads, interpret=options.interpret
    )
    return *d_tokens, jnp.sum(d_center, axis=0), d_initial, None


def _segment_axes(segment: jax.Array | None) -> str | None:
    """Return the axes of the segments of `segments_of`, for `per_shard`."""
    return None if segment is None else "b.."


_gram.defvjp(_gram_fwd, _gram_bwd)


def _decay_before(gates: Any, pair_rows: Any, options: GramOptions) -> jax.Array:
    """Return the decay from token j < i to token i, else 0: [64, 64]."""
    i, j = indices((CHUNK, CHUNK))
    return jnp.where(i > j, pair_decay(gates, pair_rows, decay=True, resets=options.resets), 0.0)


def _operand_tiles() -> dict[str, Any]:
    """Return the types of the operands of the sums over a chunk, in shared memory: two bfloat16 halves each."""
    return {
        "decay": smem(2, CHUNK, CHUNK, dtype=jnp.bfloat16),
        "value": smem(2, CHUNK, SLAB, dtype=jnp.bfloat16),
    }


def _sum_pairs(operands: Any, *, transpose: bool = False) -> jax.Array:
    """Return decay @ value, or decay.T @ value, of `_operand_tiles`."""
    decay = [operands.decay.at[half].T if transpose else operands.decay.at[half] for half in (0, 1)]
    value = [operands.value.at[half] for half in (0, 1)]
    return products(split_terms(decay, value))[0]


def _scan(arrays: tuple[Any, ...], options: GramOptions) -> list[jax.Array]:
    """Return m or m k, A after the last token and A before each chunk [B, P, N, K]."""
    k, log_decay, gain, center, initial, segment = arrays
    batch, length, heads, key_dim = k.shape
    count = length // CHUNK
    result = k.dtype if options.return_write_key else jnp.float32

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        operands = shared.operands
        b, h, slab = index("batch", "head", "slab")
        channels = pl.ds(slab * SLAB, SLAB)

        def load(n: Any, slot: Any) -> None:
            keys, loaded = source.k.at[b, pl.ds(n * CHUNK, CHUNK), h, channels], shared.loaded.at[slot]
            plgpu.copy_gmem_to_smem(keys, shared.k.at[slot], loaded)
            plgpu.copy_gmem_to_smem(source.gates.at[b, h, n], shared.gates.at[slot], loaded)
            plgpu.copy_gmem_to_smem(pair_rows_of(source.gates.at[b, h, n]), shared.pair_rows.at[slot], loaded)

        def chunk(n: Any, start: jax.Array) -> jax.Array:
            slot = lax.rem(n, jnp.int32(2))
            pl.when(n + 1 < count)(lambda: load(n + 1, 1 - slot))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # until `start` of the previous chunk is stored
            shared.start[...] = start
            plgpu.barrier_wait(shared.loaded.at[slot])
            gates, key = shared.gates.at[slot], read(shared.k.at[slot])
            added = key * key * row_scale(gates.at[_GAIN], key)
            decay = _decay_before(gates, shared.pair_rows.at[slot], options)
            split(decay, operands.decay.at[0], operands.decay.at[1])
            split(added, operands.value.at[0], operands.value.at[1])
            from_start = row_scale(gates.at[FROM_START], key)
            to_end = row_scale(gates.at[TO_END], key)
            chunk_decay = gates[FROM_START, CHUNK - 1]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.start, target.start.at[b, h, n, channels])
            running = _sum_pairs(operands) + from_start * along_rows(start, key) + added
            _, multiplier = _multiplier(running, source.center[h], options)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # until `out` of the previous chunk is stored
            shared.out[...] = (multiplier * key if options.return_write_key else multiplier).astype(result)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.out, target.out.at[b, pl.ds(n * CHUNK, CHUNK), h, channels])
            return chunk_decay * start + jnp.sum(to_end * added, axis=0)

        load(0, 0)
        initial = read_global_columns(source.initial.at[b, h, channels])
        target.final[b, h, channels] = lax.fori_loop(0, count, chunk, initial)
        plgpu.wait_smem_to_gmem(0)

    found = launch(
        body,
        "gram",
        inputs={"k": k, "gates": gates_of(gain, log_decay, segment), "center": center, "initial": initial},
        out={
            "out": jax.ShapeDtypeStruct(k.shape, result),
            "final": jax.ShapeDtypeStruct(initial.shape, jnp.float32),
            "start": jax.ShapeDtypeStruct((batch, heads, count, key_dim), jnp.float32),
        },
        scratch={
            "k": smem(2, CHUNK, SLAB, dtype=k.dtype),
            "gates": plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
            "pair_rows": pair_rows_tile(2),
            "operands": _operand_tiles(),
            "out": smem(CHUNK, SLAB, dtype=result),
            "start": plgpu.SMEM((SLAB,), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=3, num_barriers=2),
        },
        grid={"batch": batch, "slab": key_dim // SLAB, "head": heads},
        interpret=options.interpret,
    )
    return [found.out, found.final, found.start]


def _multiplier(running: jax.Array, center: jax.Array, options: GramOptions) -> tuple[jax.Array, jax.Array]:
    """Return (r, the multiplier) for the running sum A."""
    r = jnp.log(running + _EPSILON) - center
    return r, jnp.exp(-math.log(options.squash) * r / (1.0 + jnp.abs(r)))


def _scan_backward(arrays: tuple[Any, ...], options: GramOptions) -> list[jax.Array]:
    """Return the gradients of k, log_decay, gain, the center by batch row [B, P] and the initial A."""
    k, log_decay, gain, center, segment, start, d_out, d_final = arrays
    batch, length, heads, key_dim = k.shape
    count, slabs = length // CHUNK, key_dim // SLAB

    def body(index: BlockIndex, source: Any, target: Any, shared: Any) -> None:
        b, h, slab = index("batch", "head", "slab")
        channels = pl.ds(slab * SLAB, SLAB)

        def load(n: Any, slot: Any) -> None:
            rows, loaded = pl.ds(n * CHUNK, CHUNK), shared.loaded.at[slot]
            plgpu.copy_gmem_to_smem(source.k.at[b, rows, h, channels], shared.k.at[slot], loaded)
            plgpu.copy_gmem_to_smem(source.d_out.at[b, rows, h, channels], shared.d_out.at[slot], loaded)
            plgpu.copy_gmem_to_smem(source.gates.at[b, h, n], shared.gates.at[slot], loaded)
            plgpu.copy_gmem_to_smem(pair_rows_of(source.gates.at[b, h, n]), shared.pair_rows.at[slot], loaded)
            plgpu.copy_gmem_to_smem(source.start.at[b, h, n, channels], shared.start.at[slot], loaded)

        def chunk(reverse: Any, d_after: jax.Array) -> jax.Array:
            n = count - 1 - reverse
            slot = lax.rem(reverse, jnp.int32(2))
            operands = opaque_addresses(shared.operands)
            pl.when(n > 0)(lambda: load(n - 1, 1 - slot))
            plgpu.barrier_wait(shared.loaded.at[slot])
            gates = shared.gates.at[slot]

            def added() -> jax.Array:
                key = read(shared.k.at[slot])
                return key * key * row_scale(gates.at[_GAIN], key)

            # Values that are used twice are read or computed twice: the registers do not hold them.
            decay = _decay_before(gates, shared.pair_rows.at[slot], options)
            split(decay, operands.decay.at[0], operands.decay.at[1])
            split(added(), operands.value.at[0], operands.value.at[1])
            plgpu.commit_smem()
            before = _sum_pairs(operands)  # with the next line, exp(log_decay) times A of the previous token
            before = before + row_scale(gates.at[FROM_START], before) * column_scale(shared.start.at[slot], before)
            shared.before[...] = before
            running = before + added()
            r, multiplier = _multiplier(running, source.center[h], options)
            d_multiplier = read(shared.d_out.at[slot])
            if options.return_write_key:
                shared.d_key[...] = d_multiplier * multiplier
                d_multiplier = d_multiplier * read(shared.k.at[slot])
            d_r = d_multiplier * multiplier * (-math.log(options.squash)) / jnp.square(1.0 + jnp.abs(r))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # until the results of the following chunk are stored
            shared.sums[_D_CENTER, ...] = -jnp.sum(d_r, axis=1)
            d_running = d_r / (running + _EPSILON)
            chunk_decay = gates[FROM_START, CHUNK - 1]
            split(d_running, operands.value.at[0], operands.value.at[1])
            d_before = chunk_decay * d_after + jnp.sum(row_scale(gates.at[FROM_START], d_running) * d_running, axis=0)
            plgpu.commit_smem()
            # The whole gradient of A at each token, which equals that of the term that the token adds.
            d_added = d_running + row_scale(gates.at[TO_END], d_running) * along_rows(d_after, d_running)
            d_added = d_added + _sum_pairs(operands, transpose=True)
            shared.sums[_D_LOG_DECAY, ...] = jnp.sum(read(shared.before) * d_added, axis=1)
            key = read(shared.k.at[slot])
            shared.sums[_D_GAIN, ...] = jnp.sum(key * key * d_added, axis=1)
            d_key = 2.0 * key * row_scale(gates.at[_GAIN], key) * d_added
            if options.return_write_key:
                d_key = d_key + read(shared.d_key)
            shared.d_k[...] = d_key.astype(k.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.d_k, target.d_k.at[b, pl.ds(n * CHUNK, CHUNK), h, channels])
            plgpu.copy_smem_to_gmem(shared.sums, target.sums.at[b, h, n, slab])
            return d_before

        load(count - 1, 0)
        d_final = read_global_columns(source.d_final.at[b, h, channels])
        target.d_initial[b, h, channels] = lax.fori_loop(0, count, chunk, d_final)
        plgpu.wait_smem_to_gmem(0)

    found = launch(
        body,
        "gram_back",
        inputs={
            "k": k,
            "gates": gates_of(gain, log_decay, segment),
            "center": center,
            "start": start,
            "d_out": d_out,
            "d_final": d_final,
        },
        out={
            "d_k": jax.ShapeDtypeStruct(k.shape, k.dtype),
            "sums": jax.ShapeDtypeStruct((batch, heads, count, slabs, _SUMS, CHUNK), jnp.float32),
            "d_initial": jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        },
        scratch={
            "k": smem(2, CHUNK, SLAB, dtype=k.dtype),
            "d_out": smem(2, CHUNK, SLAB, dtype=d_out.dtype),
            "gates": plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
            "pair_rows": pair_rows_tile(2),
            "start": plgpu.SMEM((2, SLAB), jnp.float32),
            "operands": _operand_tiles(),
            "d_k": smem(CHUNK, SLAB, dtype=k.dtype),
            "before": smem(CHUNK, SLAB, dtype=jnp.float32),
            "d_key": smem(CHUNK, SLAB, dtype=jnp.float32),
            "sums": plgpu.SMEM((_SUMS, CHUNK), jnp.float32),
            "loaded": plgpu.Barrier(num_arrivals=5, num_barriers=2),
        },
        grid={"batch": batch, "slab": slabs, "head": heads},
        interpret=options.interpret,
    )
    sums = jnp.sum(found.sums, axis=3)  # over the slabs of key channels
    d_gain, d_log_decay, d_center = (sums[:, :, :, row] for row in (_D_GAIN, _D_LOG_DECAY, _D_CENTER))
    return [found.d_k, from_chunks(d_log_decay), from_chunks(d_gain), jnp.sum(d_center, axis=(2, 3)), found.d_initial]
