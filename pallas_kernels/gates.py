"""What every token of a chunk is scaled by, as the kernels read it."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import CHUNK

# Rows of the gates of a chunk, [GATES, 64] float32; the first three are all that the recurrences read.
BETA = 0
FROM_START = 1  # what is left, at a token, of the memory that the chunk starts with
TO_END = 2  # what is left, at the end of the chunk, of what a token writes
SCALES = 3
CUMULATIVE = 3  # the sum of the log decays from the start of the chunk
DOCUMENT = 4  # how often the memory has restarted since the start of the chunk
GATES = 5


def to_chunks(x: jax.Array) -> jax.Array:
    """[B, T, H] -> [B, H, N, 64]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1, CHUNK)


def from_chunks(x: jax.Array) -> jax.Array:
    """[B, H, N, 64] -> [B, T, H]."""
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


def fill(x: jax.Array, multiple: int = CHUNK) -> jax.Array:
    """[B, T, ...] with zeros after the last token, up to a multiple of tokens."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))


def documents_of(restarts: jax.Array) -> jax.Array:
    """[B, N, 64] float32, how often the memory has restarted since the start of a chunk, of restarts [B, T] bool."""
    in_chunks = restarts.astype(jnp.int32).reshape(restarts.shape[0], -1, CHUNK)
    return jnp.cumsum(in_chunks, axis=-1).astype(jnp.float32)


def gates_of(beta: jax.Array, log_decay: jax.Array | None, documents: jax.Array | None) -> jax.Array:
    """[B, H, N, GATES, 64] of beta and a scalar log decay [B, T, H], and the documents [B, N, 64] float32."""
    beta = to_chunks(beta)
    ones, zeros = jnp.ones_like(beta), jnp.zeros_like(beta)
    rows = [beta, ones, ones, zeros, zeros]
    if log_decay is not None:
        log_decay = to_chunks(log_decay)
        rows[CUMULATIVE] = jnp.cumsum(log_decay, axis=-1)
        rows[FROM_START] = jnp.exp(rows[CUMULATIVE])
        # A sum of its own: a difference of two long sums would lose digits beside strong decays.
        after = lax.cumsum(log_decay, axis=3, reverse=True)
        rows[TO_END] = jnp.exp(jnp.pad(after[..., 1:], [(0, 0)] * 3 + [(0, 1)]))
    if documents is not None:
        rows[DOCUMENT] = jnp.broadcast_to(documents[:, None], beta.shape)
        rows[FROM_START] = jnp.where(rows[DOCUMENT] == 0, rows[FROM_START], 0.0)
        rows[TO_END] = jnp.where(rows[DOCUMENT] == rows[DOCUMENT][..., -1:], rows[TO_END], 0.0)
    return jnp.stack(rows, axis=3)
