"""The delta rule over a sequence that is split over devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from osdn_jax.ops import collectives
from osdn_jax.ops.arguments import Call


def delta_rule(
    run: Callable[[Call], tuple[jax.Array, jax.Array]], call: Call, axis: str
) -> tuple[jax.Array, jax.Array]:
    """The delta rule over all devices of the axis, by run on each: (outputs here, memory after the last token of all).

    The outputs are affine in the memory before them, too: o = own + through^T S, where through is what the identity in
    place of the memory is read as. Tokens after a restart see nothing of S.
    """
    axes = collectives.axes_of(call)
    call = collectives.vary(call, axes)
    batch, heads, key_dim, _ = call.memory.shape
    own_out, own = run(call._replace(memory=jnp.zeros_like(call.memory)))
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=call.memory.dtype), (batch, heads, key_dim, key_dim))
    nothing = jnp.zeros((*call.v.shape[:3], key_dim), call.v.dtype)
    nothing, identity = collectives.vary((nothing, identity), axes)
    through, transition = run(call._replace(v=nothing, memory=identity))
    restarted = later = None
    if call.restarts is not None:
        restarted = jnp.any(call.restarts, axis=1)
        later = (jnp.cumsum(call.restarts.astype(jnp.int32), axis=1) > 0)[..., None, None]
        through = jnp.where(later, jnp.zeros_like(through), through)
    parts = (collectives.keep_unless(restarted, transition), own, restarted)
    memory = collectives.entering(collectives.matrix_after, parts, call.memory, axis)
    read = jnp.einsum("bthk,bhkv->bthv", through.astype(memory.dtype), memory)
    if later is not None:
        read = jnp.where(later, jnp.zeros_like(read), read)
    after = collectives.matrix_after(parts, memory)
    return own_out.astype(memory.dtype) + read, collectives.of_last(after, axis)
