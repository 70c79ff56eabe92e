"""The Gram preconditioner of Preconditioned DeltaNet on Hopper GPUs: multipliers, or write keys at once.

One block per batch, head and 64 key channels walks the chunks of 64 tokens with the running sum A in registers; the
gradient walks them back. Inside a chunk A is a product with the decays of all pairs, in float32's order of precision.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.gates import (
    BETA,
    FROM_START,
    GATES,
    TO_END,
    clamped,
    from_chunks,
    gates_of,
    pad_to_multiple,
    pair_decay,
    pair_rows_of,
    pair_rows_tile,
    segments_of,
)
from pallas_kernels.common.launch import launch_flat
from pallas_kernels.common.partitioning import Heads, per_shard
from pallas_kernels.common.shard_map import match_varying_axes
from pallas_kernels.common.tiles import (
    CHUNK,
    SLAB,
    along_rows,
    column_scale,
    indices,
    opaque_address,
    products,
    read,
    read_global_columns,
    row_scale,
    smem,
    split,
    split_terms,
)

_EPSILON = 1e-6
_SIZES = (64, 128, 256)
_GAIN = BETA  # the row of the gates that holds it

# Rows of the sums over key channels of the gradient, [SUMS, 64] float32.
_D_GAIN, _D_LOG_DECAY, _D_CENTER = range(3)
_SUMS = 3


class GramOptions(NamedTuple):
    """Options that are fixed when a kernel is built."""

    squash: float
    multiply: bool  # whether the results are write keys, in the type of k, or multipliers in float32
    resets: bool
    interpret: bool


def limitation(k: jax.Array, log_decay: jax.Array) -> str | None:
    """Why the kernels cannot serve keys [B, T, P, K]; None where they can."""
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
    multiply: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The multipliers m, or the write keys m k, of the running sum A of squared keys.

        A_t = exp(log_decay_t) A_{t-1} + gain_t k_t^2
        m_t = exp(-log(squash) r / (1 + |r|)),    r = log(A_t + 1e-6) - center

    Args:
        k: [B, T, P, K] bfloat16, float16 or float32, K of 64, 128 or 256; any T.
        log_decay, gain: [B, T, P] float32.
        center: [P] float32.
        squash: the largest multiplier.
        initial: A before the first token [B, P, K] float32.
        resets: [B, T] bool; True resets A to zeros before that token.
        multiply: return the write keys m k, in the type of k, and not m, in float32.
        interpret: run on any machine, in the interpreter, with races detected.

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
        return jnp.zeros(k.shape, k.dtype if multiply else jnp.float32), initial

    segment = None if resets is None else segments_of(pad_to_multiple(resets))
    options = GramOptions(squash, multiply, resets=segment is not None, interpret=interpret)
    tokens = (pad_to_multiple(k), pad_to_multiple(clamped(log_decay)), pad_to_multiple(gain))
    out, final = _gram(*match_varying_axes((*tokens, center, initial, segment)), options)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _gram(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return _gram_fwd(*arguments)[0]


def _gram_fwd(*arguments: Any) -> Any:
    *arrays, options = arguments
    axes, interpret = (*_AXES, "bk.", _segment_axes(arrays[-1])), options.interpret
    results = ("b.k.", "bk.", "bk..")
    out, final, starts = per_shard(
        _scan, tuple(arrays), axes, results, options, heads=Heads(arrays[0].shape[2]), interpret=interpret
    )
    return (out, final), (*arrays, starts)


def _gram_bwd(options: GramOptions, saved: Any, cotangents: Any) -> Any:
    k, log_decay, gain, center, _, segment, starts = saved
    arrays = (k, log_decay, gain, center, segment, starts, *cotangents)
    axes = (*_AXES, _segment_axes(segment), "bk..", "b.k.", "bk.")
    results, interpret = ("b.k.", "b.k", "b.k", "bk", "bk."), options.interpret
    *d_tokens, d_center, d_initial = per_shard(
        _scan_backward, arrays, axes, results, options, heads=Heads(k.shape[2]), interpret=interpret
    )
    return *d_tokens, jnp.sum(d_center, axis=0), d_initial, None


def _segment_axes(segment: jax.Array | None) -> str | None:
    return None if segment is None else "b.."


_gram.defvjp(_gram_fwd, _gram_bwd)


_AXES = ("b.k.", "b.k", "b.k", "k")  # of keys, log decay, gain and center, for `per_shard`


class _Tiles(NamedTuple):
    """Shared memory in which a chunk's sums are formed."""

    decay: Any  # two halves of what is left at token i of token j < i
    value: Any  # two halves of what is summed

    @staticmethod
    def types() -> list[Any]:
        return [smem(2, CHUNK, CHUNK, dtype=jnp.bfloat16), smem(2, CHUNK, SLAB, dtype=jnp.bfloat16)]


def _before(gates_s: Any, pair_rows_s: Any, options: GramOptions) -> jax.Array:
    i, j = indices((CHUNK, CHUNK))
    return jnp.where(i > j, pair_decay(gates_s, pair_rows_s, decay=True, resets=options.resets), 0.0)


def _summed(tiles: _Tiles, *, transpose: bool = False) -> jax.Array:
    decay = [tiles.decay.at[half].T if transpose else tiles.decay.at[half] for half in (0, 1)]
    value = [tiles.value.at[half] for half in (0, 1)]
    return products(split_terms(decay, value))[0]


def _scan(arrays: tuple[Any, ...], options: GramOptions) -> list[jax.Array]:
    """(m or m k, A after the last token, A before each chunk [B, P, N, K])."""
    k, log_decay, gain, center, initial, segment = arrays
    batch, length, heads, key_dim = k.shape
    count = length // CHUNK
    result = k.dtype if options.multiply else jnp.float32
    out = [
        jax.ShapeDtypeStruct(k.shape, result),
        jax.ShapeDtypeStruct(initial.shape, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, count, key_dim), jnp.float32),
    ]

    def body(
        at: Any,
        k_ref: Any,
        gates_ref: Any,
        center_ref: Any,
        initial_ref: Any,
        out_ref: Any,
        final_ref: Any,
        starts_ref: Any,
        *refs: Any,
    ) -> None:
        k_s, gates_s, pair_rows_s, decay_s, value_s, out_s, start_s, loaded = refs
        b, h, c = at("batch", "head", "part")
        channels, tiles = pl.ds(c * SLAB, SLAB), _Tiles(decay_s, value_s)

        def load(n: Any, slot: Any) -> None:
            plgpu.copy_gmem_to_smem(k_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, channels], k_s.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates_s.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(pair_rows_of(gates_ref.at[b, h, n]), pair_rows_s.at[slot], loaded.at[slot])

        def chunk(n: Any, start: jax.Array) -> jax.Array:
            slot = lax.rem(n, jnp.int32(2))
            pl.when(n + 1 < count)(lambda: load(n + 1, 1 - slot))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the chunk before's start, but not its results
            start_s[...] = start
            plgpu.barrier_wait(loaded.at[slot])
            gates, key = gates_s.at[slot], read(k_s.at[slot])
            added = key * key * row_scale(gates.at[_GAIN], key)
            decay = _before(gates, pair_rows_s.at[slot], options)
            split(decay, decay_s.at[0], decay_s.at[1])
            split(added, value_s.at[0], value_s.at[1])
            lead = row_scale(gates.at[FROM_START], key)
            until_end = row_scale(gates.at[TO_END], key)
            kept = gates[FROM_START, CHUNK - 1]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(start_s, starts_ref.at[b, h, n, channels])
            running = _summed(tiles) + lead * along_rows(start, key) + added
            _, multiplier = _multiplier(running, center_ref[h], options)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out_s[...] = (multiplier * key if options.multiply else multiplier).astype(result)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, channels])
            return kept * start + jnp.sum(until_end * added, axis=0)

        load(0, 0)
        final_ref[b, h, channels] = lax.fori_loop(0, count, chunk, read_global_columns(initial_ref.at[b, h, channels]))
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        smem(2, CHUNK, SLAB, dtype=k.dtype),
        plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
        pair_rows_tile(2),
        *_Tiles.types(),
        smem(CHUNK, SLAB, dtype=result),
        plgpu.SMEM((SLAB,), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=2),
    ]
    grid = {"batch": batch, "part": key_dim // SLAB, "head": heads}
    arguments = [k, gates_of(gain, log_decay, segment), center, initial]
    return launch_flat(body, "gram", out, grid, scratch, options.interpret, arguments)


def _multiplier(running: jax.Array, center: jax.Array, options: GramOptions) -> tuple[jax.Array, jax.Array]:
    """(r, the multiplier) of the running sum."""
    r = jnp.log(running + _EPSILON) - center
    return r, jnp.exp(-math.log(options.squash) * r / (1.0 + jnp.abs(r)))


def _scan_backward(arrays: tuple[Any, ...], options: GramOptions) -> list[jax.Array]:
    """The gradients of k, log_decay, gain, the center by sequence [B, P] and the first A."""
    k, log_decay, gain, center, segment, starts, d_out, d_final = arrays
    batch, length, heads, key_dim = k.shape
    count, slabs = length // CHUNK, key_dim // SLAB
    out = [
        jax.ShapeDtypeStruct(k.shape, k.dtype),
        jax.ShapeDtypeStruct((batch, heads, count, slabs, _SUMS, CHUNK), jnp.float32),
        jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
    ]

    def body(
        at: Any, k_ref: Any, gates_ref: Any, center_ref: Any, starts_ref: Any, d_out_ref: Any, d_final_ref: Any,
        d_k_ref: Any, sums_ref: Any, d_initial_ref: Any, *refs: Any,
    ) -> None:  # fmt: skip
        k_s, d_out_s, gates_s, pair_rows_s, start_s, decay_s, value_s, d_k_s, before_s, d_key_s, sums_s, loaded = refs
        b, h, c = at("batch", "head", "part")
        channels = pl.ds(c * SLAB, SLAB)

        def load(n: Any, slot: Any) -> None:
            rows = pl.ds(n * CHUNK, CHUNK)
            for ref, tile in ((k_ref, k_s), (d_out_ref, d_out_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, rows, h, channels], tile.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(gates_ref.at[b, h, n], gates_s.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(pair_rows_of(gates_ref.at[b, h, n]), pair_rows_s.at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(starts_ref.at[b, h, n, channels], start_s.at[slot], loaded.at[slot])

        def chunk(step: Any, d_after: jax.Array) -> jax.Array:
            n = count - 1 - step
            slot = lax.rem(step, jnp.int32(2))
            tiles = _Tiles(*opaque_address(decay_s, value_s))
            pl.when(n > 0)(lambda: load(n - 1, 1 - slot))
            plgpu.barrier_wait(loaded.at[slot])
            gates = gates_s.at[slot]

            def added() -> jax.Array:
                key = read(k_s.at[slot])
                return key * key * row_scale(gates.at[_GAIN], key)

            # What is needed again is read or formed again: the registers hold no more.
            decay = _before(gates, pair_rows_s.at[slot], options)
            split(decay, tiles.decay.at[0], tiles.decay.at[1])
            split(added(), tiles.value.at[0], tiles.value.at[1])
            plgpu.commit_smem()
            before = _summed(tiles)  # will be exp(log_decay) times A of the last token
            before = before + row_scale(gates.at[FROM_START], before) * column_scale(start_s.at[slot], before)
            before_s[...] = before
            running = before + added()
            r, multiplier = _multiplier(running, center_ref[h], options)
            d_multiplier = read(d_out_s.at[slot])
            if options.multiply:
                d_key_s[...] = d_multiplier * multiplier
                d_multiplier = d_multiplier * read(k_s.at[slot])
            d_r = d_multiplier * multiplier * (-math.log(options.squash)) / jnp.square(1.0 + jnp.abs(r))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results of the chunk after
            sums_s[_D_CENTER, ...] = -jnp.sum(d_r, axis=1)
            d_running = d_r / (running + _EPSILON)
            kept = gates[FROM_START, CHUNK - 1]
            split(d_running, tiles.value.at[0], tiles.value.at[1])
            d_before = kept * d_after + jnp.sum(row_scale(gates.at[FROM_START], d_running) * d_running, axis=0)
            plgpu.commit_smem()
            # The whole gradient of A at each token, which is also that of what the token adds.
            d_added = d_running + row_scale(gates.at[TO_END], d_running) * along_rows(d_after, d_running)
            d_added = d_added + _summed(tiles, transpose=True)
            sums_s[_D_LOG_DECAY, ...] = jnp.sum(read(before_s) * d_added, axis=1)
            key = read(k_s.at[slot])
            sums_s[_D_GAIN, ...] = jnp.sum(key * key * d_added, axis=1)
            d_key = 2.0 * key * row_scale(gates.at[_GAIN], key) * d_added
            if options.multiply:
                d_key = d_key + read(d_key_s)
            d_k_s[...] = d_key.astype(k.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_k_s, d_k_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, channels])
            plgpu.copy_smem_to_gmem(sums_s, sums_ref.at[b, h, n, c])
            return d_before

        load(count - 1, 0)
        d_initial_ref[b, h, channels] = lax.fori_loop(
            0, count, chunk, read_global_columns(d_final_ref.at[b, h, channels])
        )
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        smem(2, CHUNK, SLAB, dtype=k.dtype),
        smem(2, CHUNK, SLAB, dtype=d_out.dtype),
        plgpu.SMEM((2, GATES, CHUNK), jnp.float32),
        pair_rows_tile(2),
        plgpu.SMEM((2, SLAB), jnp.float32),
        *_Tiles.types(),
        smem(CHUNK, SLAB, dtype=k.dtype),
        *[smem(CHUNK, SLAB, dtype=jnp.float32)] * 2,
        plgpu.SMEM((_SUMS, CHUNK), jnp.float32),
        plgpu.Barrier(num_arrivals=5, num_barriers=2),
    ]
    grid = {"batch": batch, "part": slabs, "head": heads}
    arguments = [k, gates_of(gain, log_decay, segment), center, starts, d_out, d_final]
    d_k, sums, d_initial = launch_flat(body, "gram_back", out, grid, scratch, options.interpret, arguments)
    sums = jnp.sum(sums, axis=3)  # over the slabs of key channels
    d_gain, d_log_decay, d_center = (sums[:, :, :, row] for row in (_D_GAIN, _D_LOG_DECAY, _D_CENTER))
    return [d_k, from_chunks(d_log_decay), from_chunks(d_gain), jnp.sum(d_center, axis=(2, 3)), d_initial]
