"""Split a long sequence of few heads into splits that run in parallel, to fill the GPU.

The state after a split is linear in the state before it, S' = M S + N: N is the result of the split started from zeros,
M that of the split started from the identity with all values zero. From these follow the states that the splits start
from, and from M^T the gradients of the states that they end with.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.common.delta_rule_inputs import chain
from triton_kernels.delta_rule.options import Chunks, DeltaRuleOptions
from triton_kernels.delta_rule.scan import scan

_ENOUGH = 144  # programs: as many as the largest GPU has multiprocessors that the settings know, the L40S with 142
_SHORTEST = 4  # chunks of a split
_FEWEST = 4  # splits: their work is about three times that of the unsplit sequence


def split_count(batch: int, heads: int, chunks: int, value_blocks: int) -> int:
    """Return the number of splits, a power of two that gives every multiprocessor a program if there are chunks enough.

    It is 1 if the heads nearly fill the GPU or the sequence is short.
    """
    count = 1
    while count * batch * heads * value_blocks < _ENOUGH and chunks >= 2 * count * _SHORTEST:
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
        options: static options.
    """
    batch, heads, key_dim, value_dim = initial.shape
    count, length = v.shape[0] // batch, v.shape[1]
    zeros = jnp.zeros((batch * count, heads, key_dim, value_dim), jnp.float32)
    from_zeros = scan(chunks, v, zeros, options, keep="final").final_ptr
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=jnp.float32), (batch * count, heads, key_dim, key_dim))
    no_values = jnp.zeros((batch * count, length, heads, key_dim), v.dtype)
    matrices = scan(chunks, no_values, identity, options, keep="final").final_ptr
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
