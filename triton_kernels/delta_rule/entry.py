"""The asymmetric gated delta rule in Triton: the kernels in order, their gradient, and their limits."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.delta_rule_inputs import (
    Inputs,
    Splits,
    axes_of,
    final_state_gradients,
    initial_states,
    input_gradients,
)
from pallas_kernels.common.partitioning import Axes, Heads, per_shard
from pallas_kernels.common.shard_map import match_varying_axes
from pallas_kernels.common.token_gates import BETA, FROM_START, clamped, from_chunks, gates_of, segments_of
from triton_kernels.common.target import Target
from triton_kernels.common.tiles import bits_of
from triton_kernels.delta_rule.decay import decay
from triton_kernels.delta_rule.decay_backward import decay_backward
from triton_kernels.delta_rule.keys import keys
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions
from triton_kernels.delta_rule.pairs import pairs
from triton_kernels.delta_rule.prepare import prepare
from triton_kernels.delta_rule.scan import scan, scan_settings
from triton_kernels.delta_rule.scan_backward import scan_backward
from triton_kernels.delta_rule.split_sequence import split_count

DIMENSIONS = (32, 64, 128, 256)
_TYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def limitation(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, w: jax.Array | None) -> str | None:
    """Return why the kernels do not support these arguments, naming the argument; None if they do."""
    for name, x in (("q", q), ("v", v)):
        if x.dtype not in _TYPES:
            return f"{name}: got {x.dtype}, the kernels take bfloat16, float16 or float32"
        if x.shape[-1] not in DIMENSIONS:
            return f"{name}: got a head dimension of {x.shape[-1]}, the kernels take 32, 64, 128 or 256"
    for name, other in (("k", k), ("v", v), ("write_key", w)):
        if other is not None and other.dtype != q.dtype:
            return f"{name}: got {other.dtype} beside a q of {q.dtype}, the kernels take one type"
    if beta.dtype != jnp.float32:
        return f"beta: got {beta.dtype}, the kernels keep gates and state in float32"
    return None


def chunk_size(dtype: Any, key_dim: int, value_dim: int) -> int:
    """Return the tokens of a chunk: 64, or 32 where the tiles of 64 would not fit in registers and shared memory.

    Args:
        dtype: of q.
        key_dim: K.
        value_dim: V.
    """
    del value_dim
    return 64 if bits_of(dtype) == 16 and key_dim <= 128 else 32


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    *,
    write_key: jax.Array | None = None,
    log_decay: jax.Array | None = None,
    erase: bool = True,
    scale: float,
    initial_state: jax.Array,
    resets: jax.Array | None = None,
    splits: int | None = None,
    target: Target,
) -> tuple[jax.Array, jax.Array]:
    """Apply S = decay S; S += beta w (v - S^T k)^T; o = scale S^T q, in chunks.

    Products run on the tensor cores with float32 sums: of 16-bit inputs in their type, of float32 ones as three
    products of parts (tf32x3). (I + A)^-1, gates and the state are float32. The gradient saves only the inputs and runs
    the forward scan again.

    Args:
        q, k: [B, T, Hk, K] bfloat16, float16 or float32, K of 32, 64, 128 or 256; any T.
        v: [B, T, H, V] of the same type, H a multiple of Hk, V of 32, 64, 128 or 256.
        beta: [B, T, H] float32.
        write_key: w, [B, T, Hk or H, K]; default k.
        log_decay: [B, T, H] or per channel [B, T, H, K] float32.
        erase: False omits S^T k.
        scale: factor on the outputs.
        initial_state: [B, H, K, V] float32.
        resets: [B, T] bool; True resets the state to zeros before that token.
        splits: number of splits of the sequence that run in parallel; default: enough to fill the GPU if heads are few.
        target: what the kernels run on.

    Returns:
        (o [B, T, H, V] in the type of v, final state [B, H, K, V] float32).

    Raises:
        NotImplementedError: the kernels do not support these types or shapes; see `limitation`.
    """
    reason = limitation(q, k, v, beta, write_key)
    if reason is not None:
        raise NotImplementedError(reason)
    if 0 in v.shape[:3]:
        return jnp.zeros_like(v), initial_state
    channel = log_decay is not None and log_decay.ndim == 4
    options = DeltaRuleOptions(
        scale=float(scale),
        erase=erase,
        decay=log_decay is not None and not channel,
        channel=channel,
        resets=resets is not None,
        chunk=chunk_size(q.dtype, q.shape[-1], v.shape[-1]),
        target=target,
        splits=splits,
    )
    log_decay = None if log_decay is None else clamped(log_decay)
    inputs = Inputs(q, k, write_key, v, beta, log_decay, initial_state)
    return _delta_rule(*match_varying_axes((inputs, resets)), options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _delta_rule(inputs: Inputs, resets: jax.Array | None, options: DeltaRuleOptions) -> tuple[jax.Array, jax.Array]:
    out, final = _per_shard(_forward, inputs, resets, (), ("b.h.", "bh.."), options)
    return out, final


def _delta_rule_fwd(inputs: Inputs, resets: jax.Array | None, options: DeltaRuleOptions) -> Any:
    return _delta_rule(inputs, resets, options), (inputs, resets)


def _delta_rule_bwd(options: DeltaRuleOptions, saved: Any, cotangents: Any) -> Any:
    inputs, resets = saved
    # Gradients of q, k (with erase), w, v, beta, the initial state and perhaps log_decay.
    results = [*["b.h."] * (3 + options.erase), "b.h", "bh..", *filter(None, [axes_of(inputs).log_decay])]
    found = _per_shard(_backward, inputs, resets, tuple(cotangents), results, options)
    return input_gradients(inputs, found, erase=options.erase), None


def _per_shard(
    function: Any, inputs: Inputs, resets: Any, cotangents: Any, results: Sequence[Axes], options: DeltaRuleOptions
) -> list[jax.Array]:
    arguments = (inputs, resets, cotangents)
    axes = (axes_of(inputs), None if resets is None else "b.", ("b.h.", "bh..")[: len(cotangents)])
    heads = Heads(inputs.q.shape[2], inputs.v.shape[2] // inputs.q.shape[2])
    return per_shard(function, arguments, axes, results, options, heads=heads, interpret=options.target.interpret)


def _cut(inputs: Inputs, resets: jax.Array | None, options: DeltaRuleOptions) -> tuple[Splits, Inputs, Any]:
    """Return the splits, the inputs cut into them (except the initial state), and the segment of each token."""
    batch, length, heads, value_dim = inputs.v.shape
    count = options.splits
    if count is None:
        chosen = scan_settings("delta_rule_scan", options.target, inputs.q.dtype, inputs.q.shape[3], value_dim)
        count = split_count(batch, heads, -(-length // options.chunk), value_dim // chosen.block)
    splits = Splits(count, batch, length, options.chunk)
    segment = None if resets is None else segments_of(splits.cut(resets), options.chunk)
    tokens = {name: splits.cut(x) for name, x in inputs._asdict().items() if x is not None and name != "initial"}
    return splits, inputs._replace(**tokens), segment


def _prepare(inputs: Inputs, segment: jax.Array | None, options: DeltaRuleOptions, *, gradient: bool) -> Chunks:
    q, k, log_decay = inputs.q, inputs.k, inputs.log_decay
    w = k if inputs.w is None else inputs.w
    gates = gates_of(inputs.beta, log_decay if options.decay else None, segment, options.chunk).swapaxes(1, 2)
    if log_decay is None or options.decay:
        return prepare(q, k, w, gates, None, options, gradient=gradient)
    products, q, k, w, carry = decay(q, k, w, log_decay, options)
    if segment is not None:  # the state before the chunk does not pass a reset inside it
        carry = carry * gates[..., FROM_START, -1:]
    return prepare(q, k, w, gates, products, options, gradient=gradient)._replace(carry=carry)


def _forward(arguments: tuple[Inputs, jax.Array | None, Any], options: DeltaRuleOptions) -> list[jax.Array]:
    """Return [outputs, final state]."""
    splits, inputs, segment = _cut(*arguments[:2], options)
    initial = inputs.initial
    chunks = _prepare(inputs, segment, options, gradient=False)
    if splits.number > 1:
        final_of = lambda v, states: scan(chunks, v, states, options, keep="final").final_ptr
        initial, _ = initial_states(final_of, inputs.v, initial)
    results = scan(chunks, inputs.v, initial, options, keep="outputs")
    return [splits.join(results.out_ptr), splits.last(results.final_ptr)]


def _backward(arguments: tuple[Inputs, jax.Array | None, Any], options: DeltaRuleOptions) -> list[jax.Array]:
    """Return gradients of q, k (with erase), w by value head, of v, beta, the initial state and log_decay if given."""
    splits, inputs, segment = _cut(*arguments[:2], options)
    initial, log_decay = inputs.initial, inputs.log_decay
    d_out, d_final = splits.cut(arguments[2][0]), arguments[2][1]
    # R is beta times the prediction error, and the gradient of beta is Z times that error, R / beta: keep beta from 0.
    smallest = {jnp.dtype(jnp.float32): 2.0**-40, jnp.dtype(jnp.float16): 2.0**-10}.get(inputs.q.dtype, 2.0**-20)
    beta = jnp.where(jnp.abs(inputs.beta) < smallest, smallest, inputs.beta)
    chunks = _prepare(inputs._replace(beta=beta), segment, options, gradient=True)
    if splits.number > 1:
        final_of = lambda v, states: scan(chunks, v, states, options, keep="final").final_ptr
        initial, matrices = initial_states(final_of, inputs.v, initial)
        from_zeros = scan_backward(chunks, d_out, jnp.zeros_like(initial), options).d_initial_ptr
        d_final = final_state_gradients(matrices, from_zeros, d_final)
    forward = scan(chunks, inputs.v, initial, options, keep="states")
    backward = scan_backward(chunks, d_out, d_final, options)
    from_pairs = pairs(chunks, d_out, forward.residual_ptr, backward.z_ptr, options)
    found = keys(chunks, d_out, from_pairs, forward, backward, options)
    d_keys = [found.d_q_ptr, *([found.d_k_ptr] if options.erase else []), found.d_w_ptr]
    gates, d_decays = chunks.gates, []
    if options.decay:
        d_decays = [_from_chunk_rows(_d_scalar_decay(found, gates))]
    elif log_decay is not None and chunks.carry is not None:
        w = inputs.k if inputs.w is None else inputs.w
        d_decayed = (d_keys[0], d_keys[1] if options.erase else None, d_keys[-1])
        *d_keys, d_inside = decay_backward(inputs.q, inputs.k, w, log_decay, from_pairs.d_pairs_ptr, d_decayed, options)
        d_keys = d_keys if options.erase else [d_keys[0], d_keys[-1]]
        # The decay of the state over a chunk, of which every token of the chunk has a part.
        d_decays = [d_inside + jnp.repeat(chunks.carry * found.d_carry_ptr, options.chunk, axis=1)]
    d_beta = _from_chunk_rows(from_pairs.z_written_ptr / gates[..., BETA, :])
    d_keys, d_values, d_decays = (
        [splits.join(x) for x in group] for group in (d_keys, (backward.d_v_ptr, d_beta), d_decays)
    )
    return [*d_keys, *d_values, splits.first(backward.d_initial_ptr), *d_decays]


def _d_scalar_decay(found: Any, gates: jax.Array) -> jax.Array:
    """Return the gradient of the log decays by chunk [B, N, H, C] from the sums of `keys`."""
    cumulative, end = (jnp.sum(found.sums_ptr[..., row, :], axis=3) for row in range(2))
    # The sum of log decays up to the last token also decays the writes of the chunk and the state it starts from.
    d_last = jnp.sum(end, axis=3) + jnp.sum(found.d_carry_ptr, axis=-1) * gates[..., FROM_START, -1]
    return lax.cumsum(cumulative.at[..., -1].add(d_last), axis=3, reverse=True)


def _from_chunk_rows(x: jax.Array) -> jax.Array:
    """Reshape [B, N, H, C] to [B, T, H]."""
    return from_chunks(x.swapaxes(1, 2))


_delta_rule.defvjp(_delta_rule_fwd, _delta_rule_bwd)
