"""Cutting sequences into chunks and putting them together again."""

import jax
import jax.numpy as jnp


def to_chunks(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [N, B, size, ...], padded with zeros to a whole number of chunks."""
    batch, length = x.shape[:2]
    count = -(-length // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    """[N, B, size, ...] -> [B, T, ...]."""
    count, batch, size = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *x.shape[3:])[:, :length]


def documents(restarts: jax.Array | None, size: int) -> jax.Array | None:
    """How often the memory has restarted since the start of its chunk: [B, T] bool -> [N, B, size] int32."""
    if restarts is None:
        return None
    return jnp.cumsum(to_chunks(restarts.astype(jnp.int32), size), axis=-1, dtype=jnp.int32)


def fitting_chunk(size: int, length: int) -> int:
    """The chunk size for a sequence: no longer than the next power of two above the sequence."""
    shortest = 1
    while shortest < length:
        shortest *= 2
    return min(size, shortest)
