"""A chunk of the hypergradient preconditioner token by token, with the projection, and the adjoint of a token."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.tiles import CHUNK
from pallas_kernels.hypergradient.chunk import ANCHOR_WEIGHT, BETA, FORGET, RESET, STEP, HypergradientOptions

LOADED_TOKENS = 16  # tokens whose rows are in shared memory at once

Gate = Callable[[int], Any]  # reads one scalar of this token's gates: gate(STEP)


def load_row(ref: Any) -> jax.Array:
    """Return a vector [K] as float32, spread over the lanes of every warp, so that a warp sums it without a barrier."""
    return plgpu.load(ref, layout=_row_layout(ref.shape[0])).astype(jnp.float32)


def zero_row(size: int) -> jax.Array:
    """Return zeros in the layout of `load_row`."""
    return plgpu.layout_cast(jnp.zeros((size,), jnp.float32), _row_layout(size))


def _row_layout(size: int) -> Any:
    """Return the layout of a vector [size] that every warp holds."""
    per_lane = min(4, size // 32)
    tiling = plgpu.Tiling(((32 * per_lane,), (per_lane,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1)


def out_of_bounds(d: jax.Array, options: HypergradientOptions) -> jax.Array:
    """Return 1 where a value is outside the bounds or NaN, else 0."""
    lo, hi = options.bounds or (-jnp.inf, jnp.inf)
    return jnp.where((d >= lo) & (d <= hi), 0.0, 1.0)


def update(
    d: jax.Array, u: jax.Array, gate: Gate, anchor: Any, options: HypergradientOptions
) -> tuple[jax.Array, Any, Any]:
    """Return (d after a token before its projection, <d, u>, feedback) for d and u [K]."""
    predicted = jnp.sum(d * u)
    feedback = 1.0 - gate(BETA) * predicted
    updated = d
    if options.forget:
        updated = gate(FORGET) * updated
        if options.anchored:
            updated = updated + gate(ANCHOR_WEIGHT) * load_row(anchor)
    return updated + (gate(STEP) * feedback) * u, predicted, feedback


def key_rows(size: int, dtype: Any) -> dict[str, Any]:
    """Return scratch of `scan_tokens`: the keys of `LOADED_TOKENS` tokens."""
    return {"k": plgpu.SMEM((LOADED_TOKENS, size), dtype), "loaded": plgpu.Barrier()}


def scan_tokens(
    d: jax.Array,
    keys_from: Callable[[Any], Any],
    shared: Any,
    gates: Any,
    rows: Any,
    *,
    options: HypergradientOptions,
    write: Callable[[Any, jax.Array, jax.Array], None] | None = None,
) -> jax.Array:
    """Return d [K] after the tokens of a chunk, with resets and the projection.

    Args:
        d: before the first token.
        keys_from: returns the reference to the keys of `LOADED_TOKENS` tokens in global memory, given the first.
        shared: namespace with the vectors `after_reset` and `anchor` [K] in shared memory.
        gates: of the chunk, in shared memory.
        rows: namespace of references to `key_rows`.
        options: of the kernel.
        write: called with the index of each token, its key and the d that it uses, both [K].
    """

    def scan_loaded(m: Any, d: jax.Array) -> jax.Array:
        plgpu.commit_smem()  # all warps have read the previous rows
        plgpu.copy_gmem_to_smem(keys_from(m * LOADED_TOKENS), rows.k, rows.loaded)
        plgpu.barrier_wait(rows.loaded)

        def token(i: Any, d: jax.Array) -> jax.Array:
            gate = lambda row: gates[row, m * LOADED_TOKENS + i]
            if options.resets:
                d = apply_reset(gate(RESET), shared.after_reset, d)
            key = load_row(rows.k.at[i])
            if write is not None:
                write(m * LOADED_TOKENS + i, key, d)
            return project(update(d, key * key, gate, shared.anchor, options)[0], options)

        return lax.fori_loop(0, LOADED_TOKENS, token, d)

    return lax.fori_loop(0, CHUNK // LOADED_TOKENS, scan_loaded, d)


def apply_reset(reset: Any, after_reset: Any, d: jax.Array) -> jax.Array:
    """Return d, or the state after a reset if reset is 1."""
    return jnp.where(jnp.broadcast_to(reset > 0.0, d.shape), load_row(after_reset), d)


def split_reset_cotangent(reset: Any, d_used: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents of both arguments of `apply_reset`, (of d, of the state after a reset)."""
    reset = jnp.broadcast_to(reset > 0.0, d_used.shape)
    return jnp.where(reset, 0.0, d_used), jnp.where(reset, d_used, 0.0)


def project(d: jax.Array, options: HypergradientOptions) -> jax.Array:
    """Return d clipped to the bounds; NaN stays NaN."""
    if options.bounds is None:
        return d
    lo, hi = options.bounds
    return jnp.where(d < lo, lo, jnp.where(d > hi, hi, d))


def project_vjp(cotangent: jax.Array, d: jax.Array, options: HypergradientOptions) -> jax.Array:
    """Return the cotangent of d from that of `project(d)`. A value on a bound passes its gradient on."""
    if options.bounds is None:
        return cotangent
    lo, hi = options.bounds
    return jnp.where(d < lo, 0.0, jnp.where(d > hi, 0.0, cotangent))


class TokenAdjoint(NamedTuple):
    """The cotangents of one token, and two values of its update."""

    d_before: jax.Array  # of d before the token [K]
    d_updated: jax.Array  # of d after it, before the projection [K]
    d_coefficient: Any  # of step * feedback
    predicted: Any  # <d, u>
    feedback: Any


def token_vjp(
    d_after: jax.Array,
    d_out: jax.Array,
    d: jax.Array,
    u: jax.Array,
    gate: Gate,
    anchor: Any,
    options: HypergradientOptions,
) -> TokenAdjoint:
    """Return the adjoint of one token.

    Args:
        d_after: cotangent of the state after the token [K].
        d_out: cotangent of the d that the token uses, as a result [K].
        d: that the token uses [K].
        u: squared key [K].
        gate: of the token.
        anchor: [K] in shared memory.
        options: of the kernel.
    """
    updated, predicted, feedback = update(d, u, gate, anchor, options)
    d_updated = project_vjp(d_after, updated, options)
    d_coefficient = jnp.sum(d_updated * u)
    d_before = gate(FORGET) * d_updated if options.forget else d_updated
    d_before = d_before + d_out - (gate(BETA) * gate(STEP) * d_coefficient) * u
    return TokenAdjoint(d_before, d_updated, d_coefficient, predicted, feedback)


def adjoint_rows(size: int, key: Any, d_out: Any) -> dict[str, Any]:
    """Return scratch of `scan_tokens_backward`: rows of k, d and the cotangent of d, of `LOADED_TOKENS` tokens."""
    dtypes = {"k": key, "d": jnp.float32, "d_out": d_out}
    return {name: plgpu.SMEM((LOADED_TOKENS, size), dtype) for name, dtype in dtypes.items()}


def scan_tokens_backward(
    rows_from: Callable[[Any], Sequence[Any]],
    rows: Any,
    loaded: Any,
    step: Callable[[Any, list[Any], Any], Any],
    carry: Any,
) -> Any:
    """Fold step(t, [k, d, d_out] of the token, carry) over the tokens of a chunk, the last first.

    Args:
        rows_from: returns the references to the rows of `LOADED_TOKENS` tokens in global memory, given the first.
        rows: namespace of references to `adjoint_rows`.
        loaded: barrier for three copies.
        step: returns the next carry.
        carry: first argument of the fold.
    """
    buffers = [rows.k, rows.d, rows.d_out]

    def scan_loaded(reverse: Any, carry: Any) -> Any:
        first = CHUNK - LOADED_TOKENS - reverse * LOADED_TOKENS
        plgpu.commit_smem()  # all warps have read the previous rows
        for source, buffer in zip(rows_from(first), buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer, loaded)
        plgpu.barrier_wait(loaded)

        def token(reverse: Any, carry: Any) -> Any:
            i = LOADED_TOKENS - 1 - reverse
            return step(first + i, [buffer.at[i] for buffer in buffers], carry)

        return lax.fori_loop(0, LOADED_TOKENS, token, carry)

    return lax.fori_loop(0, CHUNK // LOADED_TOKENS, scan_loaded, carry)
