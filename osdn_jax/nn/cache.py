"""Attention caches of a fixed number of tokens: the entry of position p is in slot p modulo that number.

Slots are the second axis from the end. A step overwrites one slot, at the same cost however full the cache is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


class Places(NamedTuple):
    """The positions of the tokens of a call, on one device if the sequence is split over several.

    Attributes:
        position: position of the first token of the whole call.
        first: position of the first token of this device.
        own: position of each token of this device, [T].
        of_keys: position of each token of the whole call, [N].
        starts: position at which the segment of each token of this device began, [B, T].
        next: (position of the token after the call, start of the segment that it may continue [B]).
    """

    position: Int[Array, ""]
    first: Int[Array, ""]
    own: Int[Array, " T"]
    of_keys: Int[Array, " N"]
    starts: Int[Array, "B T"]
    next: tuple[Int[Array, ""], Int[Array, " B"]]


def places(
    before: tuple[jax.Array, jax.Array] | None,
    shape: tuple[int, int],
    segment_ids: Int[Array, "B T"] | None,
    context_axis: str | None,
) -> Places:
    """Return the positions of the tokens of a call.

    Args:
        before: (position, start) of a state; None at the start of a sequence.
        shape: (B, T), tokens of this device.
        segment_ids: [B, T] integers, for packed sequences; None for one segment.
        context_axis: mesh axis that splits the sequence, or None.
    """
    batch, length = shape
    position, start = (jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32)) if before is None else before
    total, offset = length, jnp.zeros((), jnp.int32)
    if context_axis is not None:
        total, offset = length * jax.lax.axis_size(context_axis), length * jax.lax.axis_index(context_axis)
        if segment_ids is not None:
            segment_ids = jax.lax.all_gather(segment_ids, context_axis, axis=1, tiled=True)
    of_keys = position + jnp.arange(total, dtype=jnp.int32)
    all_starts = segment_starts(of_keys, start, segment_ids)
    starts = jax.lax.dynamic_slice_in_dim(all_starts, offset, length, axis=1)
    last = jnp.concatenate([start[:, None], all_starts], axis=1)[:, -1]
    first = position + offset
    own = first + jnp.arange(length, dtype=jnp.int32)
    return Places(position, first, own, of_keys, starts, (position + total, last))


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
