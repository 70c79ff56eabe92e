"""Split a long sequence of few heads into splits that run in parallel, to fill the GPU.

The state after a split is linear in the state before it, S' = M S + N: N is the result of the split started from zeros,
M that of the split started from the identity with all values zero. From these follow the states that the splits start
from, and from M^T the gradients of the states that they end with.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.delta_rule_inputs import chain
from pallas_kernels.delta_rule.chunk_loop import tile_width
from pallas_kernels.delta_rule.prepare import Chunks, DeltaRuleOptions
from pallas_kernels.delta_rule.scan import scan

_MULTIPROCESSORS = 132
_SHORTEST = 16  # chunks of a split
_FEWEST = 4  # splits: their work is about three times that of the unsplit sequence


def split_count(batch: int, heads: int, chunks: int, key_dim: int, value_dim: int) -> int:
    """Return the number of splits, a power of two whose blocks fit in one wave.

    It is 1 if the heads fill the GPU or the sequence is short.
    """
    blocks = batch * heads * value_dim // tile_width(key_dim)
    count = 1
    while 2 * count * blocks <= _MULTIPROCESSORS and chunks >= 2 * count * _SHORTEST:
        count *= 2
    return count if count >= _FEWEST else 1


def initial_states(
    chunks: Chunks, v: jax.Array, initial: jax.Array, options: DeltaRuleOptions
) -> tuple[jax.Array, jax.Array]:
    """Return the state that every split starts from [B P, H, K, V], and M of every split [B, P, H, K, K].

    Args:
        chunks: of the splits; batch and splits are one axis.
        v: [B P, T / P, H, V].
        initial: initial state of the whole sequences [B, H, K, V] float32.
        options: fixed options of the kernels.
    """
    batch, heads, key_dim, value_dim = initial.shape
    count, length = v.shape[0] // batch, v.shape[1]
    zeros = jnp.zeros((batch * count, heads, key_dim, value_dim), jnp.float32)
    from_zeros = scan(chunks, v, zeros, options, keep="final").final
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=jnp.float32), (batch * count, heads, key_dim, key_dim))
    no_values = jnp.zeros((batch * count, length, heads, key_dim), v.dtype)
    matrices = scan(chunks, no_values, identity, options, keep="final").final
    matrices = matrices.reshape(batch, count, heads, key_dim, key_dim)
    return chain("bhij,bhjv->bhiv", matrices, from_zeros, initial), matrices


def final_state_gradients(matrices: jax.Array, from_zeros: jax.Array, d_final: jax.Array) -> jax.Array:
    """Return the gradient of the state that every split ends with [B P, H, K, V].

    Args:
        matrices: M of every split [B, P, H, K, K].
        from_zeros: gradient of the state that every split starts from, given a zero gradient of the state that it ends
            with [B P, H, K, V].
        d_final: gradient of the final state of the whole sequences [B, H, K, V].
    """
    return chain("bhji,bhjv->bhiv", matrices, from_zeros, d_final, reverse=True)
