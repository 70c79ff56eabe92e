"""The hypergradient preconditioner of OSDN: a step size per key channel, learned inside the sequence."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from osdn_jax.ops import (
    checks,
    hypergradient_context,
    hypergradient_recurrence,
    mosaic_gpu,
    selection,
    sequence_parallel,
    triton,
)
from osdn_jax.ops.arguments import scaled
from osdn_jax.ops.calls import HypergradientCall, HypergradientOptions, HypergradientStart
from osdn_jax.ops.dispatch import dispatch
from osdn_jax.ops.selection import Implementation, Items, Results
from osdn_jax.ops.shards import over_shards

_EPSILON = 1e-5

PAPER: dict[str, Any] = {"eta": 1.0, "bounds": (0.0, 1e9), "initial": 0.0}
TRUST: dict[str, Any] = {"eta": 0.003, "bounds": (2 / 3, 3 / 2), "initial": 1.0}

# In order of preference; a new back end is one entry (see `selection.Implementation`).
IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_gpu": Implementation(
        mosaic_gpu.hypergradient, mosaic_gpu.hypergradient_limitation, lambda call, gradient: mosaic_gpu.by_default()
    ),
    "mosaic_gpu_interpret": Implementation(
        functools.partial(mosaic_gpu.hypergradient, interpret=True),
        functools.partial(mosaic_gpu.hypergradient_limitation, interpret=True),
    ),
    "triton": Implementation(
        triton.hypergradient, triton.hypergradient_limitation, lambda call, gradient: triton.by_default()
    ),
    "triton_interpret": Implementation(
        functools.partial(triton.hypergradient, interpret=True),
        functools.partial(triton.hypergradient_limitation, interpret=True),
    ),
    # One token costs a CPU a few hundred nanoseconds, less than its share of a chunk's small products.
    "scan": Implementation(
        hypergradient_recurrence.by_scan,
        preferred=lambda call, gradient: selection.on_cpu(),
        mixes_segments=False,
        by_default=hypergradient_recurrence.by_loop,
    ),
    "chunk": Implementation(hypergradient_recurrence.by_chunks, preferred=lambda call, gradient: True),
}


def hypergradient_preset(name: str) -> dict[str, Any]:
    """Return the keyword arguments eta, bounds and initial of one of the two published settings.

    Args:
        name: "paper" (arXiv 2605.13473: eta 1, bounds (0, 1e9), d_0 = 0, so that the first token writes nothing) or
            "trust" (eta 0.003, bounds (2/3, 3/2), d_0 = 1: never far from plain DeltaNet). `osdn` and its variants
            default to "paper"; the modules of `osdn_jax.nn` use "trust" for os_gdn and os_kda.

    Returns:
        A new dict, to be passed as **keywords to a rule or to `hypergradient_preconditioner`.

    Raises:
        ValueError: another name.

    Example:
        >>> from osdn_jax import ops
        >>> ops.hypergradient_preset("paper")
        {'eta': 1.0, 'bounds': (0.0, 1000000000.0), 'initial': 0.0}
    """
    presets = {"paper": PAPER, "trust": TRUST}
    if name not in presets:
        raise ValueError(f"preset: got {name!r}, expected one of {', '.join(sorted(presets))}")
    return dict(presets[name])


def hypergradient_preconditioner(
    k: Float[Array, "B T Hk K"],
    beta: Float[Array, "B T Hk"] | None = None,
    *,
    eta: Float[Array, " Hk"] | float,
    log_forget: Float[Array, "B T Hk"] | None = None,
    initial: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    anchor: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float = 0.0,
    bounds: tuple[float, float] | None = None,
    normalize: bool = False,
    restart: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Compute a diagonal preconditioner by hypergradient feedback (OSDN, arXiv 2605.13473).

    The write key of token t is d_t * k_t (`hypergradient_write_key` returns it). That write multiplies the residual of
    the token by 1 - b_t <d_t, u_t> with u_t = k_t^2, and d takes a gradient step on half the square of this factor:

        d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + eta b_t (1 - b_t <d_t, u_t>) u_t),    g_t = exp(log_forget_t)

    Forgetting by g is the paper's Adaptive Preconditioner Forgetting.

    Args:
        k: keys, [B, T, Hk, K], as the delta rule reads them (L2-normalised in the paper).
        beta: b_t, one per key head, [B, T, Hk]; default 1 at every token, as in `osdn`.
        eta: step size of the preconditioner, a number or one per key head, [Hk], which can be learned.
        log_forget: natural log of g_t, [B, T, Hk], at most 0; -inf forgets everything. Default None, no forgetting.
        initial: d_0, [B, Hk, K], [Hk, K] or a number; default 0. It is used unclipped, even outside the bounds.
        anchor: the value that forgetting moves d toward, [B, Hk, K], [Hk, K] or a number; default 0, as in the paper.
            1 moves toward plain DeltaNet.
        bounds: (lo, hi) of the projection after every update; either may be infinite. Default None, no projection. The
            projection is exact at every token, in every implementation.
        normalize: True divides the update by sum(u_t) + 1e-5; default False.
        restart: d at the start of every segment but the first, of the shapes of `initial`; default `initial`. Pass it
            if `initial` is the final d of an earlier call.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default 64.
        implementation: "scan" (the specification), "chunk", or a kernel: one of the names listed under `delta_rule`.
            Default None, the fastest of "scan" and "chunk" on this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`. The devices
            run at the same time if no projection binds at any token, and one after another otherwise.

    Returns:
        d: [B, T, Hk, K] at each token before its update, float32, or float64 if an input is.
        final: d after the last token, [B, Hk, K] in the same type.

    Raises:
        ValueError: a shape does not fit k, bounds are empty, chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> k = jnp.full((1, 2, 1, 4), 0.5)  # unit keys
        >>> d, final = ops.hypergradient_preconditioner(k, **ops.hypergradient_preset("paper"))
        >>> print(d[0, :, 0])  # d_0 = 0, then d_1 = k^2
        [[0.   0.   0.   0.  ]
         [0.25 0.25 0.25 0.25]]
    """
    call, options = _checked(
        k,
        beta,
        eta=eta,
        log_forget=log_forget,
        initial=initial,
        anchor=anchor,
        bounds=bounds,
        normalize=normalize,
        restart=restart,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )
    return _apply(implementation, options, call)


def hypergradient_write_key(
    k: Float[Array, "B T Hk K"],
    beta: Float[Array, "B T Hk"] | None = None,
    *,
    eta: Float[Array, " Hk"] | float,
    log_forget: Float[Array, "B T Hk"] | None = None,
    initial: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    anchor: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float = 0.0,
    bounds: tuple[float, float] | None = None,
    normalize: bool = False,
    restart: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Compute the write keys of OSDN, for `delta_rule`'s write_key (arXiv 2605.13473).

        write_key_t = d_t * k_t,    d_{t+1} = clip(g_t d_t + (1 - g_t) anchor + eta b_t (1 - b_t <d_t, u_t>) u_t)

    with u_t = k_t^2 and g_t = exp(log_forget_t): the result of `hypergradient_preconditioner` times k. Kernels compute
    the write keys in one pass.

    Args:
        k: keys, [B, T, Hk, K], as the delta rule reads them (L2-normalised in the paper).
        beta: b_t, one per key head, [B, T, Hk]; default 1 at every token, as in `osdn`.
        eta: step size of the preconditioner, a number or one per key head, [Hk], which can be learned.
        log_forget: natural log of g_t, [B, T, Hk], at most 0; -inf forgets everything. Default None, no forgetting.
        initial: d_0, [B, Hk, K], [Hk, K] or a number; default 0. It is used unclipped, even outside the bounds.
        anchor: the value that forgetting moves d toward, [B, Hk, K], [Hk, K] or a number; default 0, as in the paper.
            1 moves toward plain DeltaNet.
        bounds: (lo, hi) of the projection after every update; either may be infinite. Default None, no projection.
        normalize: True divides the update by sum(u_t) + 1e-5; default False.
        restart: d at the start of every segment but the first, of the shapes of `initial`; default `initial`. Pass it
            if `initial` is the final d of an earlier call.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk, for implementations with chunks; default 64.
        implementation: as for `hypergradient_preconditioner`.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see
            `hypergradient_preconditioner`.

    Returns:
        write_key: [B, T, Hk, K] in the type of k.
        final: d after the last token, [B, Hk, K] float32, or float64 if an input is.

    Raises:
        ValueError: a shape does not fit k, bounds are empty, chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import nn, ops
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
        >>> k = nn.unit_norm(k)
        >>> write_key, d = ops.hypergradient_write_key(k, eta=0.003, initial=1.0, bounds=(2 / 3, 3 / 2))
        >>> o, state = ops.delta_rule(q, k, v, jnp.full((1, 8, 2), 0.5), write_key=write_key)
    """
    call, options = _checked(
        k,
        beta,
        eta=eta,
        log_forget=log_forget,
        initial=initial,
        anchor=anchor,
        bounds=bounds,
        normalize=normalize,
        restart=restart,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
    )
    return _apply(implementation, options._replace(write_key=True), call)


def _checked(
    k: Any,
    beta: Any,
    *,
    eta: Any,
    log_forget: Any,
    initial: Any,
    anchor: Any,
    bounds: Any,
    normalize: Any,
    restart: Any,
    segment_ids: Any,
    chunk_size: Any,
    implementation: Any,
    context_axis: Any,
) -> tuple[HypergradientCall, HypergradientOptions]:
    checks.implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.chunk_size(chunk_size)
    context_axis = sequence_parallel.check_axis(context_axis)
    bounds = checks.bounds(bounds)
    if checks.is_number(eta) or not isinstance(eta, (jax.Array, np.ndarray)):
        eta = checks.number("eta", eta)
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    batch, length, heads, key_dim = k.shape
    if not checks.is_number(eta):
        eta = checks.shaped_array("eta", eta, (heads,), "[Hk] or a number")
    if beta is not None:
        beta = checks.shaped_array("beta", beta, (batch, length, heads), "[B, T, Hk], one per key head")
    if log_forget is not None:
        log_forget = checks.shaped_array("log_forget", log_forget, (batch, length, heads), "[B, T, Hk]")
    normalize = checks.flag("normalize", normalize)
    shapes: list[tuple[int, ...]] = [(batch, heads, key_dim), (heads, key_dim), ()]
    values = {
        name: checks.array_or_number(name, x, shapes)
        for name, x in (("initial", initial), ("anchor", anchor), ("restart", restart))
    }
    dtype = checks.accumulator_dtype(
        k, beta, log_forget, *(x for x in [eta, *values.values()] if isinstance(x, jax.Array))
    )

    resets = None
    if segment_ids is not None:
        resets = checks.resets(checks.segment_ids(segment_ids, (batch, length)), context_axis)
    if log_forget is not None:
        log_forget = checks.bounded_log(log_forget.astype(dtype))
    beta = None if beta is None else beta.astype(dtype)
    if not checks.is_number(eta):
        eta = eta.astype(dtype)[None, None]
    step = jnp.full(k.shape[:-1], eta, dtype) if beta is None else eta * beta
    if normalize:
        step = step / (jnp.sum(jnp.square(k.astype(dtype)), axis=-1) + _EPSILON)

    def full(x: jax.Array | float | None) -> jax.Array:
        if not isinstance(x, jax.Array):
            x = jnp.full((), 0.0 if x is None else x, dtype)
        return checks.varying_like(jnp.broadcast_to(x.astype(dtype), shapes[0]), k, beta, step, log_forget, resets)

    # Without forgetting the anchor has no effect, and an anchor of 0 needs no separate term.
    anchored = log_forget is not None and not (checks.is_number(anchor) and anchor == 0)
    start = HypergradientStart(
        initial=full(values["initial"]),
        after_reset=full(values["initial" if restart is None else "restart"]),
        anchor=full(values["anchor"]) if anchored else None,
    )
    options = HypergradientOptions(bounds, chunk_size, context_axis, write_key=False)
    return HypergradientCall(k, beta, step, log_forget, start, resets), options


def _apply(implementation: str | None, options: HypergradientOptions, call: HypergradientCall) -> Results:
    static = (tuple(IMPLEMENTATIONS.items()), implementation, options)
    return over_shards(_jitted_hypergradient, static, call, _axes(call), ("bthk", "bhk"), _names(call))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal calls compile once, also outside of jit
def _jitted_hypergradient(
    registry: Items, implementation: str | None, options: HypergradientOptions, call: HypergradientCall
) -> Results:
    if options.context_axis is None:
        return dispatch(registry, implementation, call, options)
    if call.k.shape[1] == 0:
        like = call.k if options.write_key else call.tokens().u
        return sequence_parallel.without_tokens(like, call.start.initial, options.context_axis)
    # `split_over` reads d to check the bounds, so write keys are computed from its result.
    local = options._replace(write_key=False)

    def run(call: HypergradientCall, options: HypergradientOptions) -> Results:
        return dispatch(registry, implementation, call, options)

    d, final = hypergradient_context.split_over(run, call, local)
    return scaled(call.k, d) if options.write_key else d, final


def _axes(call: HypergradientCall) -> HypergradientCall:
    """Return a letter for each axis of each array, as `over_shards` reads them."""
    letters = {"k": "bthk", "beta": "bth", "step": "bth", "log_forget": "bth", "resets": "bt"}
    present: dict[str, Any] = {name: None if getattr(call, name) is None else axes for name, axes in letters.items()}
    start: list[Any] = [None if x is None else "bhk" for x in call.start]
    return HypergradientCall(start=HypergradientStart(*start), **present)


def _names(call: HypergradientCall) -> list[str]:
    """Return the public names of the arguments that the arrays come from."""
    tokens = (("k", call.k), ("beta", call.beta), ("beta", call.step), ("log_forget", call.log_forget))
    start = zip(("initial", "restart", "anchor"), call.start, strict=True)
    named = (*tokens, *start, ("segment_ids", call.resets))
    return [name for name, x in named if x is not None]
