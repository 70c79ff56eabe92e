"""Helpers for a sequence that is split over the devices of a mesh axis, in order.

Inside `jax.shard_map` each device holds T tokens of a longer sequence. The state after them is affine in the state
before them, S' = M S + N: every device computes its own M and N at the same time, and one product per preceding device
then gives the state that a device starts from.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.shard_map import axes_of, vary

__all__ = [
    "affine_after",
    "axes_of",
    "check_axis",
    "cotangent_after",
    "from_last",
    "from_left",
    "ids_before",
    "state_before",
    "vary",
    "without_tokens",
    "zero_rows",
]

PyTree = Any


def check_axis(axis: Any) -> str | None:
    """Return axis, or raise TypeError if it is not a name, ValueError if it is not a mesh axis here."""
    if axis is None:
        return None
    if not isinstance(axis, str):
        raise TypeError(f"context_axis: got {axis!r}, expected the name of a mesh axis or None")
    try:
        lax.axis_size(axis)
    except NameError as error:
        raise ValueError(f"context_axis: got {axis!r}, expected a mesh axis of the enclosing jax.shard_map") from error
    return axis


def from_left(x: jax.Array, axis: str) -> jax.Array:
    """Return x of the preceding device, zeros on the first."""
    return lax.ppermute(x, axis, [(i, i + 1) for i in range(lax.axis_size(axis) - 1)])


def ids_before(ids: jax.Array, axis: str, count: int = 1) -> jax.Array:
    """Return the ids [B, count] of the tokens before this device's; on the first device, the first token's id."""
    first = jnp.repeat(ids[:, :1], count, axis=1)
    return jnp.where(lax.axis_index(axis) == 0, first, from_left(ids[:, ids.shape[1] - count :], axis))


def from_last(x: jax.Array, axis: str) -> jax.Array:
    """Return x of the last device, on all of them."""
    return lax.psum(jnp.where(lax.axis_index(axis) == lax.axis_size(axis) - 1, x, jnp.zeros_like(x)), axis)


def state_before(
    advance: Callable[[PyTree, jax.Array], jax.Array], summary: PyTree, first: jax.Array, axis: str
) -> jax.Array:
    """Return the state that this device starts from.

    Args:
        advance: (summary of a device, state before it) -> state after it.
        summary: this device's arrays; all devices' are gathered.
        first: state before the first device.
        axis: mesh axis.
    """
    index, gathered = lax.axis_index(axis), jax.tree.map(lambda x: lax.all_gather(x, axis), summary)
    state = vary(first, axes_of(gathered))
    for i in range(lax.axis_size(axis) - 1):
        state = jnp.where(i < index, advance(jax.tree.map(lambda x, i=i: x[i], gathered), state), state)
    return state


def cotangent_after(
    advance_back: Callable[[PyTree, jax.Array], jax.Array], summary: PyTree, like: jax.Array, axis: str
) -> jax.Array:
    """Return the cotangent of the state after this device's tokens that comes from the following devices.

    Args:
        advance_back: (summary of a device, cotangent after it) -> cotangent before it.
        summary: this device's arrays; all devices' are gathered.
        like: an array of the state's shape and type.
        axis: mesh axis.
    """
    index, gathered = lax.axis_index(axis), jax.tree.map(lambda x: lax.all_gather(x, axis), summary)
    state = vary(jnp.zeros_like(like), axes_of(gathered))
    for i in range(lax.axis_size(axis) - 1, 0, -1):
        state = jnp.where(i > index, advance_back(jax.tree.map(lambda x, i=i: x[i], gathered), state), state)
    return state


def affine_after(summary: tuple[jax.Array, jax.Array, jax.Array | None], state: jax.Array) -> jax.Array:
    """Return M S + N, or N for rows that contain a reset.

    By selection, not by M = 0, so that non-finite values do not pass a reset, forward or in the gradient.

    Args:
        summary: (M [..., K, K], N [..., K, V], rows that contain a reset [B] bool or None).
        state: S [..., K, V].
    """
    transition, added, any_reset = summary
    state = zero_rows(any_reset, state)
    after = jnp.einsum("...kj,...jv->...kv", transition, state, precision=lax.Precision.HIGHEST)
    return zero_rows(any_reset, after) + added


def without_tokens(like: jax.Array, state: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Return (empty outputs, final state) of an operator on a sequence without tokens.

    Nothing here depends on the empty arrays, since jaxlib cannot compile every `jax.shard_map` that uses an empty
    argument: 0.11.2 crashes if a non-empty one is used too, 0.12.0 fails if none is.

    Args:
        like: an empty array in the shape and type of the outputs.
        state: initial state, varying over every axis that the tokens vary over; also the final state.
        axis: mesh axis.
    """
    return vary(jnp.zeros_like(like), axes_of(state)), from_last(state, axis)


def zero_rows(rows: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return x [B, ...] with zeros in the marked rows, [B] bool; None marks no row."""
    if rows is None:
        return x
    return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x)
