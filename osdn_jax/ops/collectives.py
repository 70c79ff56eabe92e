"""A sequence split over the devices of a mesh axis, in order: what one of them has to know of the others.

Inside `jax.shard_map` each device holds T tokens of a longer sequence. The memory after them is affine in the one
before them, S' = M S + N: every device finds its own M and N at once, and a product for each device to its left then
gives the memory that it begins with.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.shard_map import axes_of, vary

__all__ = [
    "axes_of",
    "before",
    "check_axis",
    "entering",
    "from_left",
    "keep_unless",
    "leaving_cotangent",
    "matrix_after",
    "of_last",
    "vary",
]

PyTree = Any


def check_axis(axis: Any) -> str | None:
    """Returns axis, or raises: TypeError for no name, ValueError for one that is no mesh axis here."""
    if axis is None:
        return None
    if not isinstance(axis, str):
        raise TypeError(f"context_axis: got {axis!r}, expected the name of a mesh axis or None")
    try:
        lax.axis_size(axis)
    except NameError as error:
        raise ValueError(
            f"context_axis: got {axis!r}, expected a mesh axis of the jax.shard_map that the call is inside of"
        ) from error
    return axis


def from_left(x: jax.Array, axis: str) -> jax.Array:
    """x of the device to the left, zeros on the first."""
    return lax.ppermute(x, axis, [(i, i + 1) for i in range(lax.axis_size(axis) - 1)])


def before(ids: jax.Array, axis: str, count: int = 1) -> jax.Array:
    """The ids [B, count] of the tokens before this device's; before the first token of all, that token's own."""
    first = jnp.repeat(ids[:, :1], count, axis=1)
    return jnp.where(lax.axis_index(axis) == 0, first, from_left(ids[:, ids.shape[1] - count :], axis))


def of_last(x: jax.Array, axis: str) -> jax.Array:
    """x of the last device, on all of them."""
    return lax.psum(jnp.where(lax.axis_index(axis) == lax.axis_size(axis) - 1, x, jnp.zeros_like(x)), axis)


def entering(
    advance: Callable[[PyTree, jax.Array], jax.Array], parts: PyTree, first: jax.Array, axis: str
) -> jax.Array:
    """The state that this device begins with, by advance(parts of a device, state before it) -> state after it."""
    index, everyone = lax.axis_index(axis), jax.tree.map(lambda x: lax.all_gather(x, axis), parts)
    state = vary(first, axes_of(everyone))
    for i in range(lax.axis_size(axis) - 1):
        state = jnp.where(i < index, advance(jax.tree.map(lambda x, i=i: x[i], everyone), state), state)
    return state


def leaving_cotangent(
    advance_back: Callable[[PyTree, jax.Array], jax.Array], parts: PyTree, like: jax.Array, axis: str
) -> jax.Array:
    """The cotangent that the devices to the right have for the state after this one's tokens."""
    index, everyone = lax.axis_index(axis), jax.tree.map(lambda x: lax.all_gather(x, axis), parts)
    state = vary(jnp.zeros_like(like), axes_of(everyone))
    for i in range(lax.axis_size(axis) - 1, 0, -1):
        state = jnp.where(i > index, advance_back(jax.tree.map(lambda x, i=i: x[i], everyone), state), state)
    return state


def matrix_after(parts: tuple[jax.Array, jax.Array, jax.Array | None], state: jax.Array) -> jax.Array:
    """M S + N of M [..., K, K] and N, S [..., K, V], or N for rows whose state restarts on the way, [B] bool.

    A selection, not M = 0: what is not finite before a restart is not to be seen after it, nor the other way round.
    """
    transition, own, restarted = parts
    state = keep_unless(restarted, state)
    after = jnp.einsum("...kj,...jv->...kv", transition, state, precision=lax.Precision.HIGHEST)
    return keep_unless(restarted, after) + own


def keep_unless(restarted: jax.Array | None, x: jax.Array) -> jax.Array:
    """x [B, ...] with zeros for the rows that are restarted, [B] bool; None is no row."""
    if restarted is None:
        return x
    return jnp.where(restarted.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x)
