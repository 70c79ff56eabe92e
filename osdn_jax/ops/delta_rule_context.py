"""The delta rule over a sequence that is split over devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from osdn_jax.ops import sequence_parallel
from osdn_jax.ops.calls import DeltaRuleCall


def delta_rule(
    run: Callable[[DeltaRuleCall], tuple[jax.Array, jax.Array]], call: DeltaRuleCall, axis: str
) -> tuple[jax.Array, jax.Array]:
    """Run the delta rule on all devices of a mesh axis.

    The outputs, too, are affine in the state before the tokens: o = o(0) + through^T S, where through is the output
    for zero values and the identity as state. Tokens after a reset do not depend on S.

    Args:
        run: the delta rule on one device.
        call: this device's tokens, and the state before the first token of the whole sequence.
        axis: mesh axis that the sequence is split over.

    Returns:
        (outputs of this device's tokens, state after the last token of the whole sequence).
    """
    if call.k.shape[1] == 0:
        return sequence_parallel.without_tokens(call.v, call.state, axis)
    axes = sequence_parallel.axes_of(call)
    call = sequence_parallel.vary(call, axes)
    batch, heads, key_dim, _ = call.state.shape
    out_from_zero, state_from_zero = run(call._replace(state=jnp.zeros_like(call.state)))
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=call.state.dtype), (batch, heads, key_dim, key_dim))
    no_values = jnp.zeros((*call.v.shape[:3], key_dim), call.v.dtype)
    no_values, identity = sequence_parallel.vary((no_values, identity), axes)
    through, transition = run(call._replace(v=no_values, state=identity))
    any_reset = after_reset = None
    if call.resets is not None:
        any_reset = jnp.any(call.resets, axis=1)
        after_reset = (jnp.cumsum(call.resets.astype(jnp.int32), axis=1) > 0)[..., None, None]
        through = jnp.where(after_reset, jnp.zeros_like(through), through)
    summary = (sequence_parallel.zero_rows(any_reset, transition), state_from_zero, any_reset)
    state = sequence_parallel.state_before(sequence_parallel.affine_after, summary, call.state, axis)
    read = jnp.einsum("bthk,bhkv->bthv", through.astype(state.dtype), state)
    if after_reset is not None:
        read = jnp.where(after_reset, jnp.zeros_like(read), read)
    after = sequence_parallel.affine_after(summary, state)
    return out_from_zero.astype(state.dtype) + read, sequence_parallel.from_last(after, axis)
