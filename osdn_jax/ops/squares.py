"""The preconditioners of squared keys: their sum, or a moving average, per key channel."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, selection, sequence_parallel, squares_recurrence
from osdn_jax.ops.calls import SquaresCall, SquaresOptions
from osdn_jax.ops.dispatch import dispatch
from osdn_jax.ops.selection import Implementation, Items, Results
from osdn_jax.ops.shards import over_shards

# In order of preference; a new back end is one entry (see `selection.Implementation`).
IMPLEMENTATIONS: dict[str, Implementation] = {
    "scan": Implementation(
        squares_recurrence.by_scan,
        preferred=lambda call, gradient: selection.on_cpu(),
        mixes_segments=False,
        by_default=squares_recurrence.by_loop,
    ),
    "chunk": Implementation(squares_recurrence.by_chunks, preferred=lambda call, gradient: True),
}


def squares_preconditioner(
    k: Float[Array, "B T Hk K"],
    *,
    average: float | None = None,
    normalize: bool = False,
    initial: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    restart: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Compute a diagonal preconditioner from squared keys, as the OSDN authors' code (github.com/Lhongpei/OSLA) does.

        average=None:    D_t = D_{t-1} + k_t^2,             multiplier_t = 1 / (D_t + 1)
        average=a:       e_t = a e_{t-1} + (1 - a) k_t^2,   multiplier_t = 1 / (e_{t-1} + 1e-6)

    The write key of token t is multiplier_t * k_t (`squares_write_key` returns it). The sum that a token reads includes
    its own square; the average does not.

    Args:
        k: keys, [B, T, Hk, K].
        average: a, the share of the moving average that each token keeps, above 0 and below 1. Default None, the sum.
        normalize: with `average`, divide each multiplier by sum(multiplier k^2) + 1e-6. Default False.
        initial: D or e before the first token, [B, Hk, K], [Hk, K] or a number; default 0.
        restart: D or e at the start of every segment but the first, of the shapes of `initial`; default `initial`. Pass
            it if `initial` is the final state of an earlier call.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk of "chunk"; default 64.
        implementation: "scan" (the specification) or "chunk" (prefix sums by matrix products). Default None, the faster
            one on this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        multiplier: [B, T, Hk, K] float32, or float64 if an input is.
        final: D or e after the last token, [B, Hk, K] in the same type.

    Raises:
        ValueError: a shape does not fit k, average is not between 0 and 1, normalize is True without average,
            chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected type.

    Example:
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> k = jnp.full((1, 2, 1, 4), 0.5)  # unit keys
        >>> multiplier, final = ops.squares_preconditioner(k, initial=0.75)
        >>> print(multiplier[0, :, 0, 0], final[0, 0, 0])  # 1 / (0.75 + 0.25 + 1), then 0.25 more
        [0.5        0.44444445] 1.25
    """
    call, options = _checked(
        k, average, normalize, initial, restart, segment_ids, chunk_size, implementation, context_axis
    )
    return _apply(implementation, options, call)


def squares_write_key(
    k: Float[Array, "B T Hk K"],
    *,
    average: float | None = None,
    normalize: bool = False,
    initial: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    restart: Float[Array, "B Hk K"] | Float[Array, "Hk K"] | float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Compute the write keys of a preconditioner of squared keys, for `delta_rule`'s write_key.

        average=None:    D_t = D_{t-1} + k_t^2,             write_key_t = k_t / (D_t + 1)
        average=a:       e_t = a e_{t-1} + (1 - a) k_t^2,   write_key_t = k_t / (e_{t-1} + 1e-6)

    They equal the multipliers of `squares_preconditioner` times k.

    Args:
        k: keys, [B, T, Hk, K].
        average: a, the share of the moving average that each token keeps, above 0 and below 1. Default None, the sum.
        normalize: with `average`, divide each multiplier by sum(multiplier k^2) + 1e-6. Default False.
        initial: D or e before the first token, [B, Hk, K], [Hk, K] or a number; default 0.
        restart: D or e at the start of every segment but the first, of the shapes of `initial`; default `initial`. Pass
            it if `initial` is the final state of an earlier call.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        chunk_size: tokens per chunk of "chunk"; default 64.
        implementation: as for `squares_preconditioner`.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        write_key: [B, T, Hk, K] in the type of k.
        final: D or e after the last token, [B, Hk, K] float32, or float64 if an input is.

    Raises:
        ValueError: a shape does not fit k, average is not between 0 and 1, normalize is True without average,
            chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected type.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import nn, ops
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
        >>> k = nn.unit_norm(k)
        >>> write_key, e = ops.squares_write_key(k, average=0.9, normalize=True, initial=0.25)
        >>> o, state = ops.delta_rule(q, k, v, jnp.full((1, 8, 2), 0.5), write_key=write_key)
    """
    call, options = _checked(
        k, average, normalize, initial, restart, segment_ids, chunk_size, implementation, context_axis
    )
    return _apply(implementation, options._replace(write_key=True), call)


def _checked(
    k: Any,
    average: Any,
    normalize: Any,
    initial: Any,
    restart: Any,
    segment_ids: Any,
    chunk_size: Any,
    implementation: Any,
    context_axis: Any,
) -> tuple[SquaresCall, SquaresOptions]:
    checks.implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.chunk_size(chunk_size)
    context_axis = sequence_parallel.check_axis(context_axis)
    if average is not None and not 0.0 < checks.number("average", average) < 1.0:
        raise ValueError(f"average: got {average}, expected None or a number above 0 and below 1")
    if checks.flag("normalize", normalize) and average is None:
        raise ValueError("normalize: got True with average=None, expected it with a moving average")
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    batch, length, heads, key_dim = k.shape
    shapes: list[tuple[int, ...]] = [(batch, heads, key_dim), (heads, key_dim), ()]
    start, later = (checks.array_or_number(n, x, shapes) for n, x in (("initial", initial), ("restart", restart)))
    dtype = checks.accumulator_dtype(k, *(x for x in (start, later) if isinstance(x, jax.Array)))
    resets = None
    if segment_ids is not None:
        resets = checks.resets(checks.segment_ids(segment_ids, (batch, length)), context_axis)

    def full(x: jax.Array | float | None) -> jax.Array:
        if not isinstance(x, jax.Array):
            x = jnp.full((), 0.0 if x is None else x, dtype)
        return checks.varying_like(jnp.broadcast_to(x.astype(dtype), shapes[0]), k, resets)

    kept = 1.0 if average is None else float(average)
    log_decay, gain = (
        checks.varying_like(jnp.full(k.shape[:3], x, dtype), k)
        for x in (math.log(kept), 1.0 if average is None else 1.0 - kept)
    )
    call = SquaresCall(k, log_decay, gain, full(start), full(start if restart is None else later), resets)
    return call, SquaresOptions(average is not None, bool(normalize), chunk_size, context_axis, write_key=False)


_NAMES = ("k", "average", "average", "initial", "restart", "segment_ids")


def _apply(implementation: str | None, options: SquaresOptions, call: SquaresCall) -> Results:
    letters: Any = SquaresCall("bthk", "bth", "bth", "bhk", "bhk", "bt")  # type: ignore[arg-type]  # in place of arrays
    axes = letters._replace(resets=None if call.resets is None else "bt")
    names = [name for name, x in zip(_NAMES, call, strict=True) if x is not None]
    static = (tuple(IMPLEMENTATIONS.items()), implementation, options)
    return over_shards(_jitted_squares, static, call, axes, ("bthk", "bhk"), names)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal calls compile once, also outside of jit
def _jitted_squares(registry: Items, implementation: str | None, options: SquaresOptions, call: SquaresCall) -> Results:
    axis = options.context_axis
    if axis is None:
        return dispatch(registry, implementation, call, options)
    if call.k.shape[1] == 0:
        like = call.k if options.write_key else call.k.astype(call.initial.dtype)
        return sequence_parallel.without_tokens(like, call.initial, axis)
    call = call._replace(initial=squares_recurrence.state_before(call, axis))
    out, final = dispatch(registry, implementation, call, options)
    return out, sequence_parallel.from_last(final, axis)
