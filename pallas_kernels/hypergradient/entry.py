"""The hypergradient preconditioner of OSDN on Hopper's tensor cores, forward and backward, with exact projection.

Five kernels. Forward: `prepare` solves every chunk of 64 tokens in parallel, `scan` takes the state from chunk to chunk
in closed form, or token by token where a value of the chunk leaves the bounds or a document starts inside of it, and
`expand` gives every token its d, or its write key at once, in parallel. Backward: `prepare` once more, `expand` for the
chunks that go token by token, `scan_backward` for the cotangent of the state, `gradients` for all else.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.common.gates import clamped, from_chunks, pad_to_multiple
from pallas_kernels.common.partitioning import Heads, per_shard
from pallas_kernels.common.shard_map import match_varying_axes
from pallas_kernels.hypergradient.chunk import Static, make_gates
from pallas_kernels.hypergradient.expand import expand
from pallas_kernels.hypergradient.gradients import D_BETA, D_LOG_FORGET, D_STEP, gradients
from pallas_kernels.hypergradient.prepare import prepare
from pallas_kernels.hypergradient.scan import scan
from pallas_kernels.hypergradient.scan_backward import scan_backward

_SIZES = (64, 128, 256)


def limitation(k: jax.Array) -> str | None:
    """Why the kernels cannot serve keys [B, T, P, K]; None where they can."""
    size = k.shape[-1]
    if size not in _SIZES or (k.dtype == jnp.float32 and size > 128):
        return f"k: got {size} channels of {k.dtype}, the kernels take 64, 128 or, in 16 bits, 256"
    if k.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"k: got {k.dtype}, the kernels take bfloat16, float16 or float32"
    return None


def hypergradient(
    k: jax.Array,
    step: jax.Array,
    beta: jax.Array | None,
    log_forget: jax.Array | None,
    restart: jax.Array | None,
    initial: jax.Array,
    restart_state: jax.Array,
    anchor: jax.Array | None,
    bounds: tuple[float, float] | None,
    *,
    multiply: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """d before each token, or the write keys d k, [B, T, P, K], and d after the last token [B, P, K].

        d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + step_t (1 - beta_t <d_t, u_t>) u_t),  g_t = exp(log_forget_t)

    with u = k^2 in float32. Differentiable in every array but restart; a value on a bound passes its gradient on.

    Args:
        k: [B, T, P, K], bfloat16, float16 or, up to K = 128, float32; K of 64, 128 or 256. Any T.
        step: [B, T, P].
        beta: [B, T, P]; None is 1.
        log_forget: [B, T, P], at most 0; None forgets nothing.
        restart: [B, T] bool: the state restarts from restart_state before this token. None: nowhere.
        initial, restart_state: [B, P, K].
        anchor: [B, P, K]; None is 0.
        bounds: (lo, hi) of every update, or None; either may be infinite.
        multiply: return the write keys d k, in the type of k, and not d, in float32.
        interpret: run on any machine, in the interpreter, with races detected.

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
        return jnp.zeros(k.shape, k.dtype if multiply else jnp.float32), initial.astype(jnp.float32)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    static = Static(
        bounds=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        forget=log_forget is not None,
        anchored=anchor is not None and log_forget is not None,  # without forgetting nothing is drawn anywhere
        documents=restart is not None,
        multiply=multiply,
        interpret=interpret,
    )
    beta = jnp.ones(step.shape, jnp.float32) if beta is None else f32(beta)
    # The tokens that fill the last chunk have a step of 0 and forget nothing.
    k, step, beta = pad_to_multiple(k), pad_to_multiple(f32(step)), pad_to_multiple(beta)
    log_forget = None if log_forget is None else pad_to_multiple(clamped(f32(log_forget)))
    starts = None if restart is None else pad_to_multiple(f32(restart))
    states = (f32(initial), f32(restart_state), jnp.zeros_like(f32(initial)) if anchor is None else f32(anchor))
    out, final = _hypergradient(*match_varying_axes((k, step, beta, log_forget, starts, *states)), static)
    return out[:, :length], final


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _hypergradient(*arguments: Any) -> tuple[jax.Array, jax.Array]:
    return _hypergradient_fwd(*arguments)[0]


def _hypergradient_fwd(*arguments: Any) -> tuple[Any, Any]:
    *arrays, static = arguments
    forget, starts = (None if x is None else axes for x, axes in zip(arrays[3:5], ("b.k", "b."), strict=True))
    axes, results = ("b.k.", "b.k", "b.k", forget, starts, *["bk."] * 3), ("b.k.", "bk.", *_WALKED[1:5])
    out, final, *walked = per_shard(
        _forward, tuple(arrays), axes, results, static, heads=Heads(arrays[0].shape[2]), interpret=static.interpret
    )
    return (out, final), (arrays[0], *walked, *arrays[6:])


def _hypergradient_bwd(static: Static, walked: Any, cotangents: Any) -> Any:
    results = ("b.k.", *["b.k"] * (2 + static.forget), *["bk."] * (2 + static.anchored))
    arrays, axes = (*walked, *cotangents), (*_WALKED, "b.k.", "bk.")
    found = per_shard(
        _backward, arrays, axes, results, static, heads=Heads(arrays[0].shape[2]), interpret=static.interpret
    )
    (d_k, d_step, d_beta), found = found[:3], found[3:]
    d_log_forget = found.pop(0) if static.forget else None
    d_initial, d_restart, *d_anchor = found
    return d_k, d_step, d_beta, d_log_forget, None, d_initial, d_restart, d_anchor[0] if d_anchor else None


# For `per_shard`, the axes of what is kept for the gradient: k, gates, d before each chunk, feedback, which chunks go
# token by token, what documents start from, anchor.
_WALKED = ("b.k.", "bk...", "bk..", "bk..", "bk.", "bk.", "bk.")


def _forward(arrays: tuple[Any, ...], static: Static) -> list[jax.Array]:
    """(d or d k, d after the last token), then what is kept of the scan."""
    k, step, beta, log_forget, starts, initial, restart, anchor = arrays
    gates = make_gates(step, beta, log_forget, starts)
    (inverse,) = prepare(k, gates, None, static)
    befores, feedback, final, redone = scan(k, gates, inverse, initial, restart, anchor, static)
    walked = (k, gates, befores, feedback, redone, restart, anchor)
    return [expand(*walked, static=static, multiply=static.multiply), final, *walked[1:5]]


def _backward(arrays: tuple[Any, ...], static: Static) -> list[jax.Array]:
    """The gradients of k, step, beta, log_forget, the two states and, if any, the anchor."""
    walked, (used, final) = arrays[:7], arrays[7:]
    k, gates, befores, feedback, redone, _, anchor = walked
    prepared = prepare(k, gates, used, static)
    d = expand(*walked, static=static, multiply=False, redone_only=True) if static.exact else None
    r, after, initial, restart = scan_backward(k, gates, prepared, redone, d, used, final, anchor, static)
    d_k, d_gates, *d_anchor = gradients(k, gates, befores, feedback, redone, d, used, r, after, anchor, static)
    rows = (D_STEP, D_BETA, D_LOG_FORGET)[: 2 + static.forget]
    d_tokens = (from_chunks(d_gates[:, :, :, row]) for row in rows)
    return [d_k, *d_tokens, initial, restart, *(jnp.sum(x, axis=2) for x in d_anchor)]


_hypergradient.defvjp(_hypergradient_fwd, _hypergradient_bwd)
