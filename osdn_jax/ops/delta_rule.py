"""The one operator: `delta_rule`, and its choice of implementation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, chunkwise, collectives, context, mosaic_gpu, recurrence
from osdn_jax.ops.arguments import Call, call_axes, call_names, check_call, resolve_scale
from osdn_jax.ops.containment import contained, scan_in_blocks
from osdn_jax.ops.selection import forward_by_scan
from osdn_jax.ops.shards import over_shards

Implementation = Callable[..., tuple[jax.Array, jax.Array]]


class Options(NamedTuple):
    """What is static in a call."""

    erase: bool
    scale: float
    chunk_size: int | None
    context_axis: str | None


def _scan(call: Call, *, erase: bool, scale: float, chunk_size: int | None) -> tuple[jax.Array, jax.Array]:
    del chunk_size  # the scan has no chunks
    return recurrence.scan(call, erase=erase, scale=scale)


def _fastest(call: Call, *, erase: bool, scale: float, chunk_size: int | None) -> tuple[jax.Array, jax.Array]:
    options: dict[str, Any] = {"erase": erase, "scale": scale, "chunk_size": chunk_size}
    if mosaic_gpu.by_default() and mosaic_gpu.limitation(call, chunk_size) is None:
        return _contained(mosaic_gpu.delta_rule, call, **options)
    if not forward_by_scan(call):
        return _contained(chunkwise.chunk, call, **options)

    # Without a gradient the scan is the faster of the two here; with one, the chunks are, by far.
    @jax.custom_vjp
    def forward(call: Call) -> tuple[jax.Array, jax.Array]:
        return _scan(call, **options)

    def forward_fwd(call: Call) -> tuple[Any, Any]:
        return jax.vjp(lambda call: _contained(chunkwise.chunk, call, **options), call)

    forward.defvjp(forward_fwd, lambda pull, cotangents: pull(cotangents))
    return forward(call)


def _contained(run: Implementation, call: Call, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The call by run, and a document in it that is not finite by the scan."""

    def fast(call: Call, restarts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return run(call._replace(restarts=restarts), **options)

    def exact(call: Call, restarts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        call = call._replace(restarts=restarts)
        return recurrence.scan(call, erase=options["erase"], scale=options["scale"], loop=scan_in_blocks)

    return contained(fast, exact, call._replace(restarts=None), call.restarts)


# A new kernel joins here: (Call, *, erase, scale, chunk_size) -> (outputs [B, T, H, V], final memory [B, H, K, V]).
IMPLEMENTATIONS: dict[str, Implementation] = {
    "scan": _scan,
    "chunk": functools.partial(_contained, chunkwise.chunk),
    "mosaic_gpu": functools.partial(_contained, mosaic_gpu.delta_rule),
    "mosaic_gpu_interpret": functools.partial(_contained, functools.partial(mosaic_gpu.delta_rule, interpret=True)),
}


def delta_rule(
    q: Float[Array, "B T Hk K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    *,
    write_key: Float[Array, "B T Hw K"] | None = None,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    erase: bool = True,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    context_axis: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The asymmetric gated delta rule.

    With S the memory of a head, [K, V], and w the write key, each token decays the memory, corrects what it recalls
    for the read key k, and reads with the query q:

        S~ = exp(log_decay) * S,    e = v - S~^T k,    S = S~ + beta w e^T,    o = scale S^T q

    w = k is the delta rule (arXiv 2102.11174, chunkwise 2406.06484), a scalar decay Gated DeltaNet (2412.06464), a
    decay per channel KDA (2510.26692), a preconditioned w OSDN (2605.13473) and Preconditioned DeltaNet (2604.21100).

    Args:
        q, k: queries and read keys, [B, T, Hk, K]. Nothing is normalised here.
        v: values, [B, T, H, V]; H is a multiple of Hk, and key head h serves value heads h H / Hk and following.
        beta: write strengths, [B, T, H].
        write_key: w, [B, T, Hk, K] or [B, T, H, K]; default k.
        log_decay: log of the factor on the memory before each token, [B, T, H] or per channel [B, T, H, K]; 0 keeps
            everything, -inf nothing (a full reset; whatever is below -1000 is one). Meant to be at most 0; a positive
            value grows the memory and is taken as it is.
        erase: False leaves out the correction, e = v: linear attention, Mamba-2's scalar decay, GLA.
        scale: factor on the output; default K^-1/2.
        initial_state: memory before the first token, [B, H, K, V]; default zeros.
        segment_ids: [B, T] integers, packed documents: the memory restarts from zeros where the id changes.
            initial_state serves the first document, and the returned memory is the last one's. Nothing passes from one
            document to another, NaN and infinities included. A call knows no ids before its own: where a sequence is
            cut at the start of a document, hand no state on.
        chunk_size: tokens per chunk of the implementations that have chunks; default by device.
        implementation: "scan" (one token at a time, the specification), "chunk" (matrix products), "mosaic_gpu"
            (kernels for Hopper GPUs: bfloat16 or float16, K and V of 64, 128 or 256), "mosaic_gpu_interpret" (the same
            kernels on any machine, slowly), or None for the fastest of "scan" and "chunk" here: it does not pick the
            kernels, which no GPU has run yet. Only "scan" has forward-mode gradients.
        context_axis: inside `jax.shard_map`, the mesh axis that the sequence is split over in equal parts, in order.
            States, before the first token of all and after the last of all, are the same on every device.

    Arrays may be split over devices by batch and heads, on mesh axes of either kind. Equal calls compile once, also
    outside of `jax.jit`.

    Returns:
        (o [B, T, H, V] in the type of v, final memory [B, H, K, V] float32, or float64 where an input is).

    Raises:
        ValueError: a shape does not fit the others, chunk_size is below 1, or implementation is not known;
            context_axis is no mesh axis here; an Explicit mesh axis splits anything but batch and heads.
        TypeError: an argument is not an array of the expected kind of type, or erase is no bool.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.
    """
    checks.implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.chunk_size(chunk_size)
    context_axis = collectives.check_axis(context_axis)
    erase = checks.flag("erase", erase)
    call = check_call(q, k, v, beta, write_key, log_decay, initial_state, segment_ids, context_axis=context_axis)
    scale = resolve_scale(scale, call.q.shape[-1])
    run = _fastest if implementation is None else IMPLEMENTATIONS[implementation]
    options = Options(erase, scale, chunk_size, context_axis)
    out, state = over_shards(
        _by_implementation, (run, options), call, call_axes(call), ("bthv", "bhkv"), call_names(call)
    )
    return out.astype(call.v.dtype), state


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_implementation(run: Implementation, options: Options, call: Call) -> tuple[jax.Array, jax.Array]:
    """Compiles once for equal calls, also where nothing around it is under jit."""
    run = functools.partial(run, erase=options.erase, scale=options.scale, chunk_size=options.chunk_size)
    return run(call) if options.context_axis is None else context.delta_rule(run, call, options.context_axis)
