"""Attention caches of a fixed number of tokens: the entry of position p is in slot p modulo that number.

Slots are the second axis from the end. A step overwrites one slot, at the same cost however full the cache is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from osdn_jax.ops import checks


def first_cache(x: Float[Array, "*B T C"], slots: int) -> Float[Array, "*B S C"]:
    """Return the cache after the first T tokens of a sequence; slots without a token hold zeros.

    Args:
        x: the tokens' entries.
        slots: S, tokens that the cache holds.
    """
    length = x.shape[-2]
    if length > slots:
        return jnp.roll(x[..., length - slots :, :], length % slots, axis=-2)
    return jnp.pad(x, [(0, slots - length if axis == x.ndim - 2 else 0) for axis in range(x.ndim)])


def append(
    cache: Float[Array, "*B S C"], x: Float[Array, "*B T C"], position: Int[Array, ""]
) -> Float[Array, "*B S C"]:
    """Return the cache with the entries of T tokens, the first at `position`, in place of the oldest ones."""
    slots, length = cache.shape[-2], x.shape[-2]
    x = x.astype(cache.dtype)
    if length == 1:
        return jax.lax.dynamic_update_slice_in_dim(cache, x, position % slots, axis=-2)
    if length > slots:
        x, position, length = x[..., length - slots :, :], position + (length - slots), slots
    index = (position + jnp.arange(length, dtype=jnp.int32)) % slots
    return cache.at[..., index, :].set(x, unique_indices=True)


def slot_positions(slots: int, position: Int[Array, ""]) -> Int[Array, " S"]:
    """Return the position of each slot's entry before the token at `position`; negative for a slot without one."""
    last = position - 1
    return last - (last - jnp.arange(slots, dtype=jnp.int32)) % slots


def segment_starts(
    positions: Int[Array, " T"], start: Int[Array, " B"], segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """Return the position at which each token's segment began.

    Args:
        positions: of the tokens.
        start: position at which the segment before the first token began.
        segment_ids: [B, T] integers, for packed sequences; None for one segment.
    """
    shape = (start.shape[0], positions.shape[0])
    if segment_ids is None:
        return jnp.broadcast_to(start[:, None], shape)
    before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)  # the first token continues its segment
    begun = jnp.where(segment_ids != before, jnp.broadcast_to(positions[None], shape), start[:, None])
    return jax.lax.cummax(begun, axis=1)


def check_arrays(batch: int, arrays: dict[str, tuple[jax.Array, tuple[int, ...]]]) -> None:
    """Raise ValueError for an array of a state, {name: (array, its shape after the batch)}, of another shape."""
    for name, (x, shape) in arrays.items():
        if x.shape != (batch, *shape):
            raise ValueError(f"state: got {name} of shape {x.shape}, expected {(batch, *shape)}")
        if name != "start":
            checks.floating_array(f"state.{name}", x, x.ndim, "")
