"""The hypergradient preconditioner of OSDN in Triton, forward and backward, with exact projection.

Six kernels. Forward: `prepare` inverts the coupling of every chunk of 64 tokens, in parallel; `scan` takes the state
from chunk to chunk, in closed form, or token by token if a value of the chunk leaves the bounds or the chunk has a
reset after its first token; `expand` computes d before every token, or its write key, in parallel. Backward: `prepare`
again and `prepare_backward`, in parallel; `scan_backward` for the cotangents of the state and of the feedback;
`gradients` for all gradients, in parallel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.partitioning import Heads, per_shard
from pallas_kernels.common.shard_map import match_varying_axes
from pallas_kernels.common.token_gates import clamped, from_chunks, pad_to_multiple
from triton_kernels.common.target import Target
from triton_kernels.hypergradient.chunk import CHUNK, Chunks, HypergradientOptions, make_gates
from triton_kernels.hypergradient.expand import expand
from triton_kernels.hypergradient.gradients import gradients
from triton_kernels.hypergradient.prepare import prepare
from triton_kernels.hypergradient.prepare_backward import prepare_backward
from triton_kernels.hypergradient.scan import scan
from triton_kernels.hypergradient.scan_backward import scan_backward

DIMENSIONS = (32, 64, 128, 256)


def limitation(k: jax.Array) -> str | None:
    """Return why the kernels cannot serve keys [B, T, P, K], None if they can."""
    if k.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"k: got {k.dtype}, the kernels take bfloat16, float16 or float32"
    if k.shape[-1] not in DIMENSIONS:
        return f"k: got {k.shape[-1]} channels, the kernels take 32, 64, 128 or 256"
    return None


def chunk_size(dtype: Any, key_dim: int) -> int:
    """Return the tokens per chunk, which are the same for every type and size of keys."""
    del dtype, key_dim
    return CHUNK


def hypergradient(
    k: jax.Array,
    step: jax.Array,
    beta: jax.Array | None,
    log_forget: jax.Array | None,
    resets: jax.Array | None,
    initial: jax.Array,
    after_reset: jax.Array,
    anchor: jax.Array | None,
    bounds: tuple[float, float] | None,
    *,
    return_write_key: bool = False,
    target: Target,
) -> tuple[jax.Array, jax.Array]:
    """Return d before each token, or the write keys d k, and d after the last token.

        d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + step_t (1 - beta_t <d_t, u_t>) u_t),  g_t = exp(log_forget_t)

    with u = k^2 in float32. Differentiable in every array but resets; a value on a bound passes its gradient on.

    Args:
        k: [B, T, P, K], bfloat16, float16 or float32; K of 32, 64, 128 or 256. Any T.
        step: [B, T, P].
        beta: [B, T, P]; None means 1.
        log_forget: [B, T, P], at most 0; None means no forgetting.
        resets: [B, T] bool; True resets the state to after_reset before that token. None means no resets.
        initial: d before the first token [B, P, K].
        after_reset: d after a reset [B, P, K].
        anchor: the value that forgetting leads to [B, P, K]; None means 0.
        bounds: (lo, hi) that every update is clipped to, or None; either may be infinite.
        return_write_key: return the write keys d k, in the type of k, instead of d, in float32; default False.
        target: what the kernels run on.

    Returns:
        (d or d k [B, T, P, K], d after the last token [B, P, K] float32).

    Raises:
        NotImplementedError: the kernels do not serve these keys; see `limitation`.
    """
    length = k.shape[1]
    reason = limitation(k)
    if reason is not None:
        raise NotImplementedError(reason)
    if 0 in k.shape[:3]:
        return jnp.zeros(k.shape, k.dtype if return_write_key else jnp.float32), initial.astype(jnp.float32)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    padded = lambda x: pad_to_multiple(x, CHUNK)
    options = HypergradientOptions(
        bounds=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        forget=log_forget is not None,
        anchored=anchor is not None and log_forget is not None,  # the anchor has no effect without forgetting
        resets=resets is not None,
        return_write_key=return_write_key,
        target=target,
    )
    beta = jnp.ones(step.shape, jnp.float32) if beta is None else f32(beta)
    # Padding tokens have a step of 0 and forget nothing, so they do not change the state.
    k, step, beta = padded(k), padded(f32(step)), padded(beta)
    log_forget = None if log_forget is None else padded(clamped(f32(log_forget)))
    resets = None if resets is None else padded(f32(resets))
    states = (f32(initial), f32(after_reset), jnp.zeros_like(f32(initial)) if anchor is None else f32(anchor))
    out, final = _hypergradient(*match_varying_axes((k, step, beta, log_forget, resets, *states)), options)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _hypergradient(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return _hypergradient_fwd(*arguments)[0]


def _hypergradient_fwd(*arguments: Any) -> tuple[Any, Any]:
    *arrays, options = arguments
    forget, resets = (None if x is None else axes for x, axes in zip(arrays[3:5], ("b.k", "b."), strict=True))
    axes = ("b.k.", "b.k", "b.k", forget, resets, *["bk."] * 3)
    kept = _chunk_axes(options)[1:6]
    heads = Heads(arrays[0].shape[2])
    out, final, *found = per_shard(
        _forward,
        tuple(arrays),
        axes,
        ("b.k.", "bk.", *(x for x in kept if x is not None)),
        options,
        heads=heads,
        interpret=options.target.interpret,
    )
    made: list[Any] = [None if x is None else found.pop(0) for x in kept]
    return (out, final), Chunks(arrays[0], *made, *arrays[6:])


def _hypergradient_bwd(options: HypergradientOptions, chunks: Chunks, cotangents: Any) -> Any:
    results = ("b.k.", *["b.k"] * (2 + options.forget), *["bk."] * (2 + options.anchored))
    arrays, axes = (*chunks, *cotangents), (*_chunk_axes(options), "b.k.", "bk.")
    heads = Heads(chunks.k.shape[2])
    found = per_shard(_backward, arrays, axes, results, options, heads=heads, interpret=options.target.interpret)
    (d_k, d_step, d_beta), found = found[:3], found[3:]
    d_log_forget = found.pop(0) if options.forget else None
    d_initial, d_after_reset, *d_anchor = found
    return d_k, d_step, d_beta, d_log_forget, None, d_initial, d_after_reset, d_anchor[0] if d_anchor else None


def _chunk_axes(options: HypergradientOptions) -> tuple[str | None, ...]:
    """Return the axes of the fields of `Chunks`, which the forward pass keeps for the gradient, for `per_shard`."""
    sequential = "bk." if options.may_run_sequentially else None
    return ("b.k.", "bk...", "bk..", "bk..", sequential, None if options.bounds is None else "bk...", "bk.", "bk.")


def _forward(arrays: tuple[Any, ...], options: HypergradientOptions) -> list[jax.Array]:
    """Return d or d k, d after the last token, then the fields of `Chunks` that are not arguments nor absent."""
    k, step, beta, log_forget, resets, initial, after_reset, anchor = arrays
    gates = make_gates(step, beta, log_forget, resets)
    chunks, final = scan(k, gates, prepare(k, gates, options), initial, after_reset, anchor, options)
    return [expand(chunks, options), final, *(x for x in chunks[1:6] if x is not None)]


def _backward(arrays: tuple[Any, ...], options: HypergradientOptions) -> list[jax.Array]:
    """Return the gradients of k, step, beta, log_forget, the two states and the anchor, without the absent ones."""
    chunks, (d_out, d_final) = Chunks(*arrays[:8]), arrays[8:]
    inverse = prepare(chunks.k, chunks.gates, options)
    effects = prepare_backward(chunks, d_out, options)
    cotangents = scan_backward(chunks, inverse, effects, d_out, d_final, options)
    d_k, d_gates, d_anchor = gradients(chunks, d_out, cotangents, options)
    d_tokens = (from_chunks(d_gates[:, :, :, row]) for row in range(2 + options.forget))
    d_states = [cotangents.d_initial, cotangents.d_after_reset]
    return [d_k, *d_tokens, *d_states, *([] if d_anchor is None else [jnp.sum(d_anchor, axis=2)])]


_hypergradient.defvjp(_hypergradient_fwd, _hypergradient_bwd)
