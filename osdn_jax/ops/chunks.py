"""Split sequences into chunks and join them again."""

import jax
import jax.numpy as jnp


def to_chunks(x: jax.Array, size: int) -> jax.Array:
    """Split [B, T, ...] into [N, B, size, ...], padded with zeros to a whole number of chunks."""
    batch, length = x.shape[:2]
    count = -(-length // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    """Join [N, B, size, ...] to [B, T, ...] and drop the padding."""
    count, batch, size = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]


def segment_index(resets: jax.Array | None, size: int) -> jax.Array | None:
    """Count the resets since the start of each token's chunk: [B, T] bool -> [N, B, size] int32."""
    if resets is None:
        return None
    return jnp.cumsum(to_chunks(resets.astype(jnp.int32), size), axis=-1, dtype=jnp.int32)


def fitting_chunk(size: int, length: int) -> int:
    """Return size, or the smallest power of two that holds the sequence if that is less."""
    shortest = 1
    while shortest < length:
        shortest *= 2
    return min(size, shortest)
