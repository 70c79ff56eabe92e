"""The Gram preconditioner of Preconditioned DeltaNet: a running diagonal of squared keys."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, gram_recurrence, mosaic_gpu, selection, sequence_parallel, triton
from osdn_jax.ops.arguments import scaled
from osdn_jax.ops.calls import GramCall, GramOptions
from osdn_jax.ops.dispatch import dispatch
from osdn_jax.ops.selection import Implementation, Items, Results
from osdn_jax.ops.shards import over_shards

CENTER = -0.2  # initial value of the learned center in the paper
SQUASH = 1.5  # x in the paper

# In order of preference; a new back end is one entry (see `selection.Implementation`).
IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_gpu": Implementation(
        mosaic_gpu.gram, mosaic_gpu.gram_limitation, lambda call, gradient: mosaic_gpu.by_default()
    ),
    "mosaic_gpu_interpret": Implementation(
        functools.partial(mosaic_gpu.gram, interpret=True),
        functools.partial(mosaic_gpu.gram_limitation, interpret=True),
    ),
    "triton": Implementation(triton.gram, triton.gram_limitation, lambda call, gradient: triton.by_default()),
    "triton_interpret": Implementation(
        functools.partial(triton.gram, interpret=True),
        functools.partial(triton.gram_limitation, interpret=True),
    ),
    "scan": Implementation(
        gram_recurrence.by_scan,
        preferred=lambda call, gradient: selection.on_cpu(),
        mixes_segments=False,
        by_default=gram_recurrence.by_loop,
    ),
    "chunk": Implementation(gram_recurrence.by_chunks, preferred=lambda call, gradient: True),
}


def gram_preconditioner(
    k: Float[Array, "B T Hk K"],
    log_decay: Float[Array, "B T Hk"],
    gain: Float[Array, "B T Hk"],
    *,
    center: Float[Array, " Hk"] | float,
    squash: float = SQUASH,
    log_squash: Float[Array, " Hk"] | None = None,
    initial: Float[Array, "B Hk K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Compute a diagonal preconditioner from a decayed running sum of squared keys (arXiv 2604.21100).

        A_t = exp(log_decay_t) A_{t-1} + gain_t k_t^2,    r = log(A_t + 1e-6) - center
        multiplier_t = exp(-log(squash) r / (1 + |r|))

    The write key of token t is multiplier_t * k_t (`gram_write_key` returns it); A_t includes that token.

    Args:
        k: keys, [B, T, Hk, K].
        log_decay: natural log of the decay of A, [B, T, Hk], at most 0; -inf forgets everything.
        gain: weight of each token in A, [B, T, Hk], at least 0.
        center: value of log A at which the multiplier is 1, per key head [Hk] or a number. The paper learns it, from
            -0.2.
        squash: x, at least 1 in the paper: the multiplier stays within [1/x, x], and 1 disables the preconditioner.
            Below 1 the multiplier is inverted. Default 1.5.
        log_squash: log(x) per key head, [Hk], in place of `squash`. It can be learned, also from 0, where its own
            gradient is the only one that is not zero. Default None.
        initial: A before the first token, [B, Hk, K]; default zeros.
        segment_ids: [B, T] integers, for packed sequences: A is reset to zeros where the id changes.
        chunk_size: tokens per chunk of "chunk"; default 64.
        implementation: "scan" (the specification), "chunk" (prefix sums by matrix products), or a kernel: one of the
            names listed under `delta_rule`. Default None, the fastest of "scan" and "chunk" on this device.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        multiplier: [B, T, Hk, K] float32, or float64 if an input is.
        final: A after the last token, [B, Hk, K] in the same type.

    Raises:
        ValueError: a shape does not fit k, squash is not positive, chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> k = jnp.asarray([1.0, 0.1]).reshape(1, 1, 1, 2)  # the first channel is the larger: it is damped
        >>> gate = jnp.ones((1, 1, 1))
        >>> multiplier, _ = ops.gram_preconditioner(k, log_decay=-gate, gain=gate, center=-2.0)
        >>> bool(multiplier[0, 0, 0, 0] < 1 < multiplier[0, 0, 0, 1])
        True
    """
    arguments = (initial, segment_ids, chunk_size, implementation, context_axis)
    return _run(False, log_squash, k, log_decay, gain, center, squash, *arguments)


def gram_write_key(
    k: Float[Array, "B T Hk K"],
    log_decay: Float[Array, "B T Hk"],
    gain: Float[Array, "B T Hk"],
    *,
    center: Float[Array, " Hk"] | float,
    squash: float = SQUASH,
    log_squash: Float[Array, " Hk"] | None = None,
    initial: Float[Array, "B Hk K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Compute the write keys of Preconditioned DeltaNet, for `delta_rule`'s write_key (arXiv 2604.21100).

        A_t = exp(log_decay_t) A_{t-1} + gain_t k_t^2,    r = log(A_t + 1e-6) - center
        write_key_t = exp(-log(squash) r / (1 + |r|)) * k_t

    They equal the multipliers of `gram_preconditioner` times k; kernels compute them in one pass.

    Args:
        k: keys, [B, T, Hk, K].
        log_decay: natural log of the decay of A, [B, T, Hk], at most 0; -inf forgets everything.
        gain: weight of each token in A, [B, T, Hk], at least 0.
        center: value of log A at which the multiplier is 1, per key head [Hk] or a number. The paper learns it, from
            -0.2.
        squash: x, at least 1 in the paper: the multiplier stays within [1/x, x], and 1 disables the preconditioner.
            Below 1 the multiplier is inverted. Default 1.5.
        log_squash: log(x) per key head, [Hk], in place of `squash`. It can be learned, also from 0, where its own
            gradient is the only one that is not zero. Default None.
        initial: A before the first token, [B, Hk, K]; default zeros.
        segment_ids: [B, T] integers, for packed sequences: A is reset to zeros where the id changes.
        chunk_size: tokens per chunk of "chunk"; default 64.
        implementation: as for `gram_preconditioner`.
        context_axis: mesh axis that the sequence is split over, inside `jax.shard_map`; see `delta_rule`.

    Returns:
        write_key: [B, T, Hk, K] in the type of k.
        final: A after the last token, [B, Hk, K] float32, or float64 if an input is.

    Raises:
        ValueError: a shape does not fit k, squash is not positive, chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
        >>> gate = jnp.full((1, 8, 2), 0.5)
        >>> write_key, a = ops.gram_write_key(k, log_decay=-gate, gain=gate, center=-0.2)
        >>> o, state = ops.delta_rule(q, k, v, gate, write_key=write_key)
    """
    arguments = (initial, segment_ids, chunk_size, implementation, context_axis)
    return _run(True, log_squash, k, log_decay, gain, center, squash, *arguments)


def _run(write_key: bool, log_squash: Any, *arguments: Any) -> Results:
    """Return the multipliers, or the write keys, and the final A.

    With a squash per head they come from the multipliers of e, exp(-r / (1 + |r|)), which all back ends compute.
    """
    (call, options), implementation = _checked(*arguments), arguments[-2]
    if log_squash is None:
        return _apply(implementation, options._replace(write_key=write_key), call)
    log_squash = checks.shaped_array("log_squash", log_squash, (call.k.shape[2],), "[Hk]")
    multiplier, final = _apply(implementation, options._replace(squash=math.e), call)
    dtype = checks.accumulator_dtype(multiplier, log_squash)
    power = log_squash.astype(dtype)[None, None, :, None]
    multiplier = jnp.exp(power * jnp.log(multiplier.astype(dtype)))
    return scaled(call.k, multiplier) if write_key else multiplier, final


def _checked(
    k: Any,
    log_decay: Any,
    gain: Any,
    center: Any,
    squash: Any,
    initial: Any,
    segment_ids: Any,
    chunk_size: Any,
    implementation: Any,
    context_axis: Any,
) -> tuple[GramCall, GramOptions]:
    checks.implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.chunk_size(chunk_size)
    context_axis = sequence_parallel.check_axis(context_axis)
    squash = checks.number("squash", squash)
    if squash <= 0:
        raise ValueError(f"squash: got {squash}, expected more than 0")
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    batch, length, heads, key_dim = k.shape
    log_decay = checks.shaped_array("log_decay", log_decay, (batch, length, heads), "[B, T, Hk]")
    gain = checks.shaped_array("gain", gain, (batch, length, heads), "[B, T, Hk]")
    if checks.is_number(center):
        center = jnp.full((heads,), checks.number("center", center), checks.accumulator_dtype(k, log_decay, gain))
    center = checks.shaped_array("center", center, (heads,), "[Hk] or a number")
    shape = (batch, heads, key_dim)
    if initial is not None:
        initial = checks.shaped_array("initial", initial, shape, "[B, Hk, K]")
    dtype = checks.accumulator_dtype(k, log_decay, gain, center, initial)
    initial = jnp.zeros(shape, dtype) if initial is None else initial.astype(dtype)
    resets = None
    if segment_ids is not None:
        resets = checks.resets(checks.segment_ids(segment_ids, (batch, length)), context_axis)
    initial = checks.varying_like(initial, k, log_decay, gain, resets)
    log_decay = checks.bounded_log(log_decay.astype(dtype))
    call = GramCall(k, log_decay, gain.astype(dtype), center.astype(dtype), initial, resets)
    return call, GramOptions(squash, chunk_size, context_axis, write_key=False)


_NAMES = ("k", "log_decay", "gain", "center", "initial", "segment_ids")


def _apply(implementation: str | None, options: GramOptions, call: GramCall) -> Results:
    letters: Any = GramCall("bthk", "bth", "bth", "h", "bhk", "bt")  # type: ignore[arg-type]  # in place of arrays
    axes = letters._replace(resets=None if call.resets is None else "bt")
    names = [name for name, x in zip(_NAMES, call, strict=True) if x is not None]
    static = (tuple(IMPLEMENTATIONS.items()), implementation, options)
    return over_shards(_jitted_gram, static, call, axes, ("bthk", "bhk"), names)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal calls compile once, also outside of jit
def _jitted_gram(registry: Items, implementation: str | None, options: GramOptions, call: GramCall) -> Results:
    axis = options.context_axis
    if axis is None:
        return dispatch(registry, implementation, call, options)
    if call.k.shape[1] == 0:
        like = call.k if options.write_key else call.k.astype(call.initial.dtype)
        return sequence_parallel.without_tokens(like, call.initial, axis)
    call = call._replace(initial=gram_recurrence.state_before(call, axis))
    out, final = dispatch(registry, implementation, call, options)
    return out, sequence_parallel.from_last(final, axis)
