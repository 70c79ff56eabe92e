"""The Gram preconditioners of Preconditioned DeltaNet: a running diagonal, and the exact matrix of the theorem."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, collectives, mosaic_gpu
from osdn_jax.ops.scores import pair_decay
from osdn_jax.ops.selection import on_cpu
from osdn_jax.ops.tiling import documents, fitting_chunk, from_chunks, to_chunks

IMPLEMENTATIONS = ("chunk", "mosaic_gpu", "mosaic_gpu_interpret", "scan")
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
        log_decay: log of the decay of A, [B, T, Hk], at most 0.
        gain: weight of each token in A, [B, T, Hk], at least 0.
        center: per key head [Hk], or a number (learned from -0.2 in the paper).
        squash: x > 0; the multiplier stays within [1/x, x]. 1 is no preconditioner.
        initial: A before the first token, [B, Hk, K]; default zeros.
        segment_ids: [B, T], packed documents: A restarts from zeros where the id changes.
        chunk_size: tokens per chunk of "chunk"; default 64.
        implementation: "scan" (the specification), "chunk" (prefix sums by matrix products), "mosaic_gpu" (kernels for
            Hopper GPUs: K of 64, 128 or 256), "mosaic_gpu_interpret" (the same kernels on any machine, slowly), or
            None for the fastest here.
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
    dtype = checks.accumulator_dtype(k, log_decay, gain, center)
    shape = (batch, heads, key_dim)
    if initial is None:
        initial = jnp.zeros(shape, dtype)
    initial = checks.shaped_array("initial", initial, shape, "[B, Hk, K]").astype(dtype)
    restarts = None
    if segment_ids is not None:
        restarts = checks.restarts(checks.segment_ids(segment_ids, (batch, length)), context_axis)
    initial = checks.varying_like(initial, k, log_decay, gain, restarts)

    log_decay, gain, center = log_decay.astype(dtype), gain.astype(dtype), center.astype(dtype)
    if context_axis is not None:
        initial = _entering(k, log_decay, gain, initial, restarts, context_axis)
    if implementation is None and mosaic_gpu.by_default() and not mosaic_gpu.gram_limitation(k, log_decay, chunk_size):
        implementation = "mosaic_gpu"
    if implementation is not None and implementation.startswith("mosaic_gpu"):
        out, final = mosaic_gpu.gram(
            k,
            log_decay,
            gain,
            center,
            squash,
            initial,
            restarts,
            chunk_size,
            multiply=multiply,
            interpret=implementation == "mosaic_gpu_interpret",
        )
        return out, _after(final, context_axis)
    update = gain[..., None] * jnp.square(k.astype(dtype))
    if (implementation or ("scan" if on_cpu() else "chunk")) == "scan":
        running, final = _scan(initial, update, log_decay, restarts)
    else:
        size = fitting_chunk(chunk_size or _DEFAULT_CHUNK, length)
        running, final = _chunk(initial, update, log_decay, restarts, size)
    r = jnp.log(running + _EPSILON) - center[None, None, :, None]
    multiplier = jnp.exp(-float(np.log(squash)) * r / (1.0 + jnp.abs(r)))
    return (write_key(multiplier, k) if multiply else multiplier), _after(final, context_axis)


def _after(final: jax.Array, axis: str | None) -> jax.Array:
    return final if axis is None else collectives.of_last(final, axis)


def _entering(
    k: jax.Array, log_decay: jax.Array, gain: jax.Array, initial: jax.Array, restarts: jax.Array | None, axis: str
) -> jax.Array:
    """A before this device's tokens: what it keeps of A and what it adds is known without A."""
    kept = jnp.exp(jnp.sum(log_decay, axis=1))
    until_end = jnp.exp(lax.cumsum(log_decay, axis=1, reverse=True) - log_decay)
    if restarts is not None:
        document = jnp.cumsum(restarts.astype(jnp.int32), axis=1)
        kept = jnp.where(jnp.any(restarts, axis=1)[:, None], 0.0, kept)
        until_end = jnp.where((document == document[:, -1:])[..., None], until_end, 0.0)
    added = jnp.einsum("btp,btpk->bpk", until_end * gain, jnp.square(k.astype(gain.dtype)))
    return collectives.entering(lambda parts, a: parts[0][..., None] * a + parts[1], (kept, added), initial, axis)


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
    initial = checks.varying_like(initial, k)

    def step(inverse: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mapped = jnp.einsum("bhij,bhj->bhi", inverse, key)
        write = mapped / (1.0 + jnp.sum(mapped * key, axis=-1, keepdims=True))
        return inverse - write[..., :, None] * mapped[..., None, :], write

    final, write = lax.scan(step, initial, jnp.moveaxis(k, 1, 0))
    return jnp.moveaxis(write, 0, 1), final


def _scan(
    initial: jax.Array, update: jax.Array, log_decay: jax.Array, restarts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    def step(a: jax.Array, token: tuple[jax.Array, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        update, log_decay, restart = token
        if restart is not None:
            a = jnp.where(restart[:, None, None], 0.0, a)
        a = jnp.exp(log_decay)[..., None] * a + update
        return a, a

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (update, log_decay, restarts))
    final, running = lax.scan(step, initial, tokens)
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
