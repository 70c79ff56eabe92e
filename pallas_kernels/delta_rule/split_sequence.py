"""A long sequence of few heads in pieces that run at once, so that they fill the GPU.

The memory after a piece is linear in the one before it, S' = M S + N: N is the piece begun with zeros, and M the piece
begun with the identity, with all values zero. From these follow the memories that the pieces begin with, and from M^T
the gradients that they end with.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.delta_rule.chunk_loop import tile_width
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions
from pallas_kernels.delta_rule.scan import scan

_MULTIPROCESSORS = 132
_SHORTEST = 16  # chunks
_FEWEST = 4  # pieces: the work is some three times that of the sequence in one


def split_count(batch: int, heads: int, chunks: int, key_dim: int, value_dim: int) -> int:
    """Pieces, a power of two, that one wave of blocks holds; 1 where heads fill the GPU or the sequence is short."""
    blocks = batch * heads * value_dim // tile_width(key_dim)
    count = 1
    while 2 * count * blocks <= _MULTIPROCESSORS and chunks >= 2 * count * _SHORTEST:
        count *= 2
    return count if count >= _FEWEST else 1


def initial_states(
    chunks: Chunks, v: jax.Array, initial: jax.Array, options: DeltaRuleOptions
) -> tuple[jax.Array, jax.Array]:
    """The memory that every piece begins with [B P, H, K, V], and M of every piece [B, P, H, K, K].

    Args:
        chunks: of the pieces, batch and pieces being one axis.
        v: [B P, T / P, H, V].
        initial: of the whole sequences [B, H, K, V] float32.
        options: fixed options of the kernels.
    """
    batch, heads, key_dim, value_dim = initial.shape
    count, length = v.shape[0] // batch, v.shape[1]
    (own,) = scan(chunks, v, jnp.zeros((batch * count, heads, key_dim, value_dim), jnp.float32), options, keep="final")
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=jnp.float32), (batch * count, heads, key_dim, key_dim))
    nothing = jnp.zeros((batch * count, length, heads, key_dim), v.dtype)
    (through,) = scan(chunks, nothing, identity, options, keep="final")
    through = through.reshape(batch, count, heads, key_dim, key_dim)

    def step(memory: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        through, own = piece
        return jnp.einsum("bhij,bhjv->bhiv", through, memory, precision=lax.Precision.HIGHEST) + own, memory

    pieces = (through.swapaxes(0, 1), own.reshape(batch, count, *own.shape[1:]).swapaxes(0, 1))
    _, memories = lax.scan(step, initial, pieces)
    return memories.swapaxes(0, 1).reshape(own.shape), through


def final_state_gradients(through: jax.Array, own: jax.Array, d_final: jax.Array) -> jax.Array:
    """The gradient of the memory that every piece ends with [B P, H, K, V].

    Args:
        through: M of every piece [B, P, H, K, K].
        own: the gradient of the memory that every piece begins with, were that of its last one zero [B P, H, K, V].
        d_final: of the whole sequences [B, H, K, V].
    """
    batch, count = through.shape[:2]

    def step(d_memory: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        through, own = piece
        return jnp.einsum("bhji,bhjv->bhiv", through, d_memory, precision=lax.Precision.HIGHEST) + own, d_memory

    pieces = (through.swapaxes(0, 1), own.reshape(batch, count, *own.shape[1:]).swapaxes(0, 1))
    _, gradients = lax.scan(step, d_final, pieces, reverse=True)
    return gradients.swapaxes(0, 1).reshape(own.shape)
