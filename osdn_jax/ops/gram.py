"""The Gram preconditioners of Preconditioned DeltaNet: a running diagonal, and the exact matrix of the theorem."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, collectives, mosaic_gpu
from osdn_jax.ops.containment import contained, scan_in_blocks
from osdn_jax.ops.scores import pair_decay
from osdn_jax.ops.selection import on_cpu
from osdn_jax.ops.shards import over_shards
from osdn_jax.ops.tiling import documents, fitting_chunk, from_chunks, to_chunks

_EPSILON = 1e-6
_DEFAULT_CHUNK = 64


def gram_preconditioner(
    k: Float[Array, "B T Hk K"],
    log_decay: Float[Array, "B T Hk"],
    gain: Float[Array, "B T Hk"],
    *,
    center: Float[Array, " Hk"] | float,
    squash: float = 1.5,
    initial: Float[Array, "B Hk K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K"]]:
    """Diagonal preconditioner from a decayed running sum of squared keys (arXiv 2604.21100).

        A_t = exp(log_decay_t) A_{t-1} + gain_t k_t^2,    r = log(A_t + 1e-6) - center
        multiplier_t = exp(-log(squash) r / (1 + |r|))

    The write key of token t is multiplier_t * k_t; A_t includes that token.

    Args:
        k: keys, [B, T, Hk, K].
        log_decay: log of the decay of A, [B, T, Hk], at most 0; -inf forgets everything.
        gain: weight of each token in A, [B, T, Hk], at least 0.
        center: per key head [Hk], or a number (learned from -0.2 in the paper).
        squash: x > 0; the multiplier stays within [1/x, x]. 1 is no preconditioner.
        initial: A before the first token, [B, Hk, K]; default zeros.
        segment_ids: [B, T], packed documents: A restarts from zeros where the id changes.
        chunk_size: tokens per chunk of "chunk"; default 64.
        implementation: "scan" (the specification), "chunk" (prefix sums by matrix products), "mosaic_gpu" (kernels for
            Hopper GPUs: K of 64, 128 or 256), "mosaic_gpu_interpret" (the same kernels on any machine, slowly), or
            None for the fastest of "scan" and "chunk" here.
        context_axis: as for `delta_rule`.

    Returns:
        (multiplier [B, T, Hk, K], A after the last token [B, Hk, K]), float32, or float64 where an input is.

    Raises:
        ValueError: a shape does not fit k, squash is not positive, chunk_size is below 1, implementation is not known.
        TypeError: an argument is not of the expected kind.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.
    """
    return preconditioned(
        k,
        log_decay,
        gain,
        center=center,
        squash=squash,
        initial=initial,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        context_axis=context_axis,
        multiply=False,
    )


def preconditioned(
    k: jax.Array,
    log_decay: jax.Array,
    gain: jax.Array,
    *,
    center: jax.Array | float,
    squash: float = 1.5,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
    multiply: bool,
) -> tuple[jax.Array, jax.Array]:
    """`gram_preconditioner`, or with multiply the write keys, in the type of k, which kernels make at once."""
    checks.implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.chunk_size(chunk_size)
    context_axis = collectives.check_axis(context_axis)
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
    restarts = None
    if segment_ids is not None:
        restarts = checks.restarts(checks.segment_ids(segment_ids, (batch, length)), context_axis)
    initial = checks.varying_like(initial, k, log_decay, gain, restarts)
    log_decay = checks.bounded_log(log_decay.astype(dtype))
    call = Call(k, log_decay, gain.astype(dtype), center.astype(dtype), initial, restarts)

    name = implementation or _fastest(k, log_decay, chunk_size)
    by_kernel = multiply and name.startswith("mosaic_gpu")
    options = Options(name, squash, chunk_size, context_axis, multiply=by_kernel)
    axes = Call("bthk", "bth", "bth", "h", "bhk", None if restarts is None else "bt")  # type: ignore[arg-type]
    names = [field for field, x in zip(_NAMES, call, strict=True) if x is not None]
    out, final = over_shards(_by_implementation, (options,), call, axes, ("bthk", "bhk"), names)
    return (write_key(out, k) if multiply and not by_kernel else out), final


def _fastest(k: jax.Array, log_decay: jax.Array, chunk_size: int | None) -> str:
    if mosaic_gpu.by_default() and mosaic_gpu.gram_limitation(k, log_decay, chunk_size) is None:
        return "mosaic_gpu"
    return "scan" if on_cpu() else "chunk"


class Options(NamedTuple):
    """What is static in a call."""

    implementation: str
    squash: float
    chunk_size: int | None
    context_axis: str | None
    multiply: bool  # write keys in place of multipliers, by kernels alone


class Call(NamedTuple):
    """The arrays of a call."""

    k: jax.Array  # [B, T, P, K]
    log_decay: jax.Array  # [B, T, P]
    gain: jax.Array  # [B, T, P]
    center: jax.Array  # [P]
    initial: jax.Array  # [B, P, K]
    restarts: jax.Array | None  # [B, T] bool


_NAMES = ("k", "log_decay", "gain", "center", "initial", "segment_ids")


@functools.partial(jax.jit, static_argnums=0)
def _by_implementation(options: Options, call: Call) -> tuple[jax.Array, jax.Array]:
    """Compiles once for equal calls, also where nothing around it is under jit."""
    axis = options.context_axis
    if axis is not None:
        entering = _entering(call.k, call.log_decay, call.gain, call.initial, call.restarts, axis)
        call = call._replace(initial=entering)
    by_scan = functools.partial(_by_scan, options)

    def fast(call: Call, restarts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return _FORMS[options.implementation](options, call._replace(restarts=restarts))

    def exact(call: Call, restarts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        multiplier, final = by_scan(call._replace(restarts=restarts), loop=scan_in_blocks)
        return (write_key(multiplier, call.k) if options.multiply else multiplier), final

    if options.implementation == "scan":
        out, final = by_scan(call)
    else:
        out, final = contained(fast, exact, call._replace(restarts=None), call.restarts)
    return out, final if axis is None else collectives.of_last(final, axis)


def _by_scan(options: Options, call: Call, loop: Callable[..., Any] = lax.scan) -> tuple[jax.Array, jax.Array]:
    running, final = _scan(call.initial, _update(call), call.log_decay, call.restarts, loop)
    return _multiplier(running, call.center, options.squash), final


def _by_chunks(options: Options, call: Call) -> tuple[jax.Array, jax.Array]:
    size = fitting_chunk(options.chunk_size or _DEFAULT_CHUNK, call.k.shape[1])
    running, final = _chunk(call.initial, _update(call), call.log_decay, call.restarts, size)
    return _multiplier(running, call.center, options.squash), final


def _by_kernels(options: Options, call: Call, *, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    k, log_decay, gain, center, initial, restarts = call
    return mosaic_gpu.gram(
        k,
        log_decay,
        gain,
        center,
        options.squash,
        initial,
        restarts,
        options.chunk_size,
        multiply=options.multiply,
        interpret=interpret,
    )


# A new kernel joins here: (Options, Call) -> (multipliers, or write keys where Options.multiply, and the final A).
_FORMS: dict[str, Callable[[Options, Call], tuple[jax.Array, jax.Array]]] = {
    "scan": _by_scan,
    "chunk": _by_chunks,
    "mosaic_gpu": _by_kernels,
    "mosaic_gpu_interpret": functools.partial(_by_kernels, interpret=True),
}
IMPLEMENTATIONS = tuple(sorted(_FORMS))


def _update(call: Call) -> jax.Array:
    return call.gain[..., None] * jnp.square(call.k.astype(call.gain.dtype))


def _multiplier(running: jax.Array, center: jax.Array, squash: float) -> jax.Array:
    r = jnp.log(running + _EPSILON) - center[None, None, :, None]
    return jnp.exp(-float(np.log(squash)) * r / (1.0 + jnp.abs(r)))


def _entering(
    k: jax.Array, log_decay: jax.Array, gain: jax.Array, initial: jax.Array, restarts: jax.Array | None, axis: str
) -> jax.Array:
    """A before this device's tokens: what it keeps of A and what it adds is known without A.

    Tokens before a restart are left out of every sum, not multiplied by zero: they may not be finite.
    """
    # The sum over later tokens, not a difference of sums: that would lose all digits beside a full reset.
    later = jnp.pad(log_decay[:, 1:], ((0, 0), (0, 1), (0, 0)))[:, : log_decay.shape[1]]
    weights = jnp.exp(lax.cumsum(later, axis=1, reverse=True)) * gain
    squares = jnp.square(k.astype(gain.dtype))
    restarted = None
    if restarts is not None:
        document, restarted = jnp.cumsum(restarts.astype(jnp.int32), axis=1), jnp.any(restarts, axis=1)
        last = (document == document[:, -1:])[..., None]
        weights = jnp.where(last, weights, 0.0)
        squares = jnp.where(last[..., None], squares, 0.0)
    kept = jnp.exp(jnp.sum(collectives.keep_unless(restarted, log_decay), axis=1))
    added = jnp.einsum("btp,btpk->bpk", weights, squares)

    def after(parts: Any, a: jax.Array) -> jax.Array:
        kept, added, restarted = parts
        return collectives.keep_unless(restarted, kept[..., None] * collectives.keep_unless(restarted, a)) + added

    return collectives.entering(after, (kept, added, restarted), initial, axis)


def write_key(multiplier: jax.Array, k: jax.Array) -> jax.Array:
    """multiplier * k, formed in the accumulator type and kept in k's: a write key is a key."""
    dtype = checks.accumulator_dtype(multiplier, k)
    return (multiplier.astype(dtype) * k.astype(dtype)).astype(k.dtype)


def exact_gram_write_key(
    k: Float[Array, "B T Hk K"],
    *,
    ridge: float = 1.0,
    initial: Float[Array, "B Hk K K"] | None = None,
) -> tuple[Float[Array, "B T Hk K"], Float[Array, "B Hk K K"]]:
    """Write keys of the exact preconditioner: with beta = 1 the memory is ridge regression (arXiv 2604.21100, theorem).

        P_t = (ridge I + sum_{s<=t} k_s k_s^T)^-1,    w_t = P_{t-1} k_t / (1 + k_t^T P_{t-1} k_t)

    A reference in float64 for small sizes, token by token; it costs T K^2 and holds no other form.

    Args:
        k: keys, [B, T, Hk, K] float64.
        ridge: weight of the identity, positive.
        initial: P before the first token, [B, Hk, K, K]; default I / ridge.

    Returns:
        (write keys [B, T, Hk, K], P after the last token [B, Hk, K, K]).

    Raises:
        ValueError: ridge is not positive, or a shape does not fit k.
        TypeError: k is not float64.
    """
    k = checks.floating_array("k", k, 4, "[B, T, Hk, K]")
    if k.dtype != jnp.float64:
        raise TypeError(f"k: got dtype {k.dtype}, expected float64 (the exact Gram rule loses its point in less)")
    ridge = checks.number("ridge", ridge)
    if ridge <= 0:
        raise ValueError(f"ridge: got {ridge}, expected more than 0")
    batch, _, heads, key_dim = k.shape
    shape = (batch, heads, key_dim, key_dim)
    if initial is None:
        initial = jnp.broadcast_to(jnp.eye(key_dim, dtype=k.dtype) / ridge, shape)
    initial = checks.shaped_array("initial", initial, shape, "[B, Hk, K, K]").astype(k.dtype)
    arrays, axes = (checks.varying_like(initial, k), k), ("bhkk", "bthk")
    return over_shards(_exact, (), arrays, axes, ("bthk", "bhkk"), ("initial", "k"))


@jax.jit
def _exact(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    initial, k = arrays

    def step(inverse: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mapped = jnp.einsum("bhij,bhj->bhi", inverse, key)
        write = mapped / (1.0 + jnp.sum(mapped * key, axis=-1, keepdims=True))
        return inverse - write[..., :, None] * mapped[..., None, :], write

    final, write = lax.scan(step, initial, jnp.moveaxis(k, 1, 0))
    return jnp.moveaxis(write, 0, 1), final


def _scan(
    initial: jax.Array,
    update: jax.Array,
    log_decay: jax.Array,
    restarts: jax.Array | None,
    loop: Callable[..., Any] = lax.scan,
) -> tuple[jax.Array, jax.Array]:
    def step(a: jax.Array, token: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        update, log_decay, restart = token
        if restart is not None:
            a = jnp.where(restart[:, None, None], 0.0, a)
        a = jnp.exp(log_decay)[..., None] * a + update
        return a, a

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (update, log_decay, restarts))
    final, running = loop(step, initial, tokens)
    return jnp.moveaxis(running, 0, 1), final


def _chunk(
    initial: jax.Array, update: jax.Array, log_decay: jax.Array, restarts: jax.Array | None, size: int
) -> tuple[jax.Array, jax.Array]:
    length = update.shape[1]

    def step(a: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        update, log_decay, document = chunk
        decay = pair_decay(log_decay.swapaxes(1, 2))  # [B, P, C, C]
        lead = decay[..., :, 0] * jnp.exp(log_decay[:, 0])[..., None]
        if document is not None:
            same = document[:, None, :, None] == document[:, None, None, :]
            decay = jnp.where(same, decay, 0.0)
            lead = jnp.where((document == 0)[:, None, :], lead, 0.0)
        running = jnp.einsum("bpij,bjpk->bipk", decay, update)
        running = running + lead.swapaxes(1, 2)[..., None] * a[:, None]
        return running[:, -1], running

    chunks = (to_chunks(update, size), to_chunks(log_decay, size), documents(restarts, size))
    # The decays inside a chunk are formed again for the gradient: they would outweigh the inputs.
    final, running = lax.scan(jax.checkpoint(step), initial, chunks)
    return from_chunks(running, length), final
