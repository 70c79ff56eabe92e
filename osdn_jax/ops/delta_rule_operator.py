"""The operator `delta_rule` and its registry of implementations."""

import functools

import jax
from jax import lax
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks, chunkwise, delta_rule_context, mosaic_gpu, scan, selection, sequence_parallel, triton
from osdn_jax.ops.arguments import call_axes, call_names, check_call, resolve_scale
from osdn_jax.ops.calls import DeltaRuleCall, DeltaRuleOptions
from osdn_jax.ops.dispatch import dispatch
from osdn_jax.ops.selection import Implementation, Items, Results
from osdn_jax.ops.shards import over_shards


def _scan(call: DeltaRuleCall, options: DeltaRuleOptions, loop: object = lax.scan) -> Results:
    return scan.scan(call, erase=options.erase, scale=options.scale, loop=loop)  # type: ignore[arg-type]


def _chunk(call: DeltaRuleCall, options: DeltaRuleOptions) -> Results:
    return chunkwise.chunk(call, erase=options.erase, scale=options.scale, chunk_size=options.chunk_size)


# In order of preference; a new back end is one entry (see `selection.Implementation`).
IMPLEMENTATIONS: dict[str, Implementation] = {
    "mosaic_gpu": Implementation(
        mosaic_gpu.delta_rule, mosaic_gpu.delta_rule_limitation, lambda call, gradient: mosaic_gpu.by_default()
    ),
    "mosaic_gpu_interpret": Implementation(
        functools.partial(mosaic_gpu.delta_rule, interpret=True),
        functools.partial(mosaic_gpu.delta_rule_limitation, interpret=True),
    ),
    "triton": Implementation(
        triton.delta_rule, triton.delta_rule_limitation, lambda call, gradient: triton.by_default()
    ),
    "triton_interpret": Implementation(
        functools.partial(triton.delta_rule, interpret=True),
        functools.partial(triton.delta_rule_limitation, interpret=True),
    ),
    "scan": Implementation(
        _scan,
        preferred=lambda call, gradient: not gradient and selection.forward_by_scan(call),
        mixes_segments=False,
    ),
    "chunk": Implementation(_chunk, preferred=lambda call, gradient: True),
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
    """Apply the asymmetric gated delta rule to a sequence.

    With S the state of a head, [K, V], and w the write key, each token decays the state, corrects the value that the
    state returns for the read key k, and reads with the query q:

        S~ = exp(log_decay) * S,    e = v - S~^T k,    S = S~ + beta w e^T,    o = scale S^T q

    w = k is the delta rule (arXiv 2102.11174, chunkwise 2406.06484), a scalar decay Gated DeltaNet (2412.06464), a
    decay per channel KDA (2510.26692), a preconditioned w OSDN (2605.13473) and Preconditioned DeltaNet (2604.21100).

    Arrays may be sharded by batch and heads, on mesh axes of either type. Equal calls compile once, also outside of
    `jax.jit`.

    Args:
        q, k: queries and read keys, [B, T, Hk, K]. They are not normalised here; `osdn_jax.nn.unit_norm` does that.
        v: values, [B, T, H, V]; H is a multiple of Hk, and value head h uses key head h // (H / Hk).
        beta: step size of each write, [B, T, H], usually in (0, 1).
        write_key: w, [B, T, Hk, K] or [B, T, H, K]; default k.
        log_decay: natural log of the factor on the state before each token, [B, T, H] or per channel [B, T, H, K];
            default 0 (no decay). -inf, and anything below -1000, is a full reset. Expected to be at most 0; a positive
            value grows the state and is not refused.
        erase: False leaves out the correction, e = v, as in linear attention, Mamba-2 and GLA; default True.
        scale: factor on the output; default K^-1/2.
        initial_state: the state before the first token, [B, H, K, V]; default zeros.
        segment_ids: [B, T] integers, for packed sequences: the state is reset to zeros where the id changes.
            initial_state serves the first segment, and the returned state is that of the last one. Nothing passes from
            one segment to another, NaN and infinities included. A call does not know the ids before its own: if a
            sequence is split between two calls at the start of a segment, pass no state to the second call.
        chunk_size: tokens per chunk, for implementations with chunks; default 64, or 32 in "chunk" on a CPU with a
            decay per channel.
        implementation: how it is computed; the preconditioners and the rules have the same names.
            "scan": one token at a time, the specification. Only it supports forward-mode gradients.
            "chunk": matrix products over chunks of tokens.
            "mosaic_gpu": kernels for Hopper GPUs. bfloat16 or float16, K and V of 64, 128 or 256.
            "mosaic_gpu_interpret": the same kernels on any machine, slowly.
            "triton": kernels for NVIDIA GPUs of compute capability 8.0 or later, with the extra `triton`. bfloat16,
            float16 or float32, K and V of at most 256 (others than 32, 64, 128 and 256 are padded).
            "triton_interpret": the same kernels on any machine, slowly, in a process started with TRITON_INTERPRET=1.
            None, the default: the faster of "scan" and "chunk" on this device, measured on CPUs. It does not pick the
            kernels, which no GPU has run yet.
        context_axis: inside `jax.shard_map`, the mesh axis that the sequence is split over in equal shards, in order.
            initial_state and the returned state are those before the first and after the last token of the whole
            sequence, the same on every device.

    Returns:
        o: outputs, [B, T, H, V] in the type of v.
        final_state: the state after the last token, [B, H, K, V] float32, or float64 if an input is.

    Raises:
        ValueError: a shape does not fit the others, chunk_size is below 1, or implementation is not known;
            context_axis is not a mesh axis here; an Explicit mesh axis splits anything but batch and heads.
        TypeError: an argument is not an array of the expected type, or an option is not of its type.
        NotImplementedError: the named implementation does not serve these types, shapes or this device.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from osdn_jax import nn, ops
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 16))
        >>> k = nn.unit_norm(k)
        >>> o, state = ops.delta_rule(q, k, v, beta=jnp.full((1, 100, 2), 0.5))
        >>> o.shape, state.shape
        ((1, 100, 2, 16), (1, 2, 16, 16))
    """
    checks.implementation(implementation, IMPLEMENTATIONS)
    chunk_size = checks.chunk_size(chunk_size)
    context_axis = sequence_parallel.check_axis(context_axis)
    erase = checks.flag("erase", erase)
    call = check_call(q, k, v, beta, write_key, log_decay, initial_state, segment_ids, context_axis=context_axis)
    options = DeltaRuleOptions(erase, resolve_scale(scale, call.q.shape[-1]), chunk_size, context_axis)
    static = (tuple(IMPLEMENTATIONS.items()), implementation, options)
    out, state = over_shards(_jitted_delta_rule, static, call, call_axes(call), ("bthv", "bhkv"), call_names(call))
    return out.astype(call.v.dtype), state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal calls compile once, also outside of jit
def _jitted_delta_rule(
    registry: Items, implementation: str | None, options: DeltaRuleOptions, call: DeltaRuleCall
) -> Results:
    def run(call: DeltaRuleCall) -> Results:
        return dispatch(registry, implementation, call, options)

    return run(call) if options.context_axis is None else delta_rule_context.delta_rule(run, call, options.context_axis)
