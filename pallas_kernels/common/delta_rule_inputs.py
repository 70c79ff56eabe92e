"""Parts that the entry points of the delta rule's kernels share in every back end: inputs, splits, sums over heads."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.token_gates import pad_to_multiple


class Inputs(NamedTuple):
    """Arrays of a call; optional ones are None.

    Once each sequence is cut into P splits, B becomes B P and T becomes T / P, a multiple of the chunk, except in the
    initial state.
    """

    q: jax.Array  # [B, T, Hk, K]
    k: jax.Array  # [B, T, Hk, K]
    w: jax.Array | None  # [B, T, Hk or H, K]; None: k
    v: jax.Array  # [B, T, H, V]
    beta: jax.Array  # [B, T, H] float32
    log_decay: jax.Array | None  # [B, T, H] or [B, T, H, K] float32
    initial: jax.Array  # [B, H, K, V] float32


def axes_of(inputs: Inputs) -> Any:
    """Return the axes of each input, in the notation of `per_shard`."""
    keys, w = "b.k.", inputs.w
    writes = None if w is None else keys if w.shape[2] == inputs.q.shape[2] else "b.h."
    decays = None if inputs.log_decay is None else "b.h."[: inputs.log_decay.ndim]
    axes: tuple[Any, ...] = (keys, keys, writes, "b.h.", "b.h", decays, "bh..")
    return Inputs(*axes)


def per_key_head(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """Sum gradients [B, T, H, K] over the value heads that read the same head of x."""
    shape = (*x.shape[:3], gradient.shape[2] // x.shape[2], x.shape[3])
    return jnp.sum(gradient.reshape(shape), axis=3, dtype=jnp.float32).astype(x.dtype)


class Splits(NamedTuple):
    """Splits of the sequences on one device, which the kernels see as a larger batch."""

    number: int  # per sequence
    batch: int
    length: int  # tokens of a sequence
    chunk: int  # tokens

    def cut(self, x: jax.Array) -> jax.Array:
        """Reshape [B, T, ...] to [B P, T / P, ...]; the padding of the last chunks writes and decays nothing."""
        return pad_to_multiple(x, self.chunk * self.number).reshape(self.batch * self.number, -1, *x.shape[2:])

    def join(self, x: jax.Array) -> jax.Array:
        """Invert `cut`."""
        return x.reshape(self.batch, -1, *x.shape[2:])[:, : self.length]

    def first(self, x: jax.Array) -> jax.Array:
        """Return the entry of the first split [B, ...] of x [B P, ...]."""
        return x.reshape(self.batch, self.number, *x.shape[1:])[:, 0]

    def last(self, x: jax.Array) -> jax.Array:
        """Return the entry of the last split [B, ...] of x [B P, ...]."""
        return x.reshape(self.batch, self.number, *x.shape[1:])[:, -1]


def _chain(
    equation: str, matrices: jax.Array, added: jax.Array, initial: jax.Array, *, reverse: bool = False
) -> jax.Array:
    """Return the state before every split [B P, H, K, V] of the recurrence S' = M S + N, in reverse order if asked.

    Args:
        equation: of the product M S in the notation of `jnp.einsum`.
        matrices: M of every split [B, P, H, K, K].
        added: N of every split [B P, H, K, V].
        initial: the state before the first split, or after the last [B, H, K, V].
        reverse: from the last split to the first.
    """
    batch, count = matrices.shape[:2]

    def step(state: jax.Array, split: Iterable[jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix, added = split
        return jnp.einsum(equation, matrix, state, precision=lax.Precision.HIGHEST) + added, state

    splits = (matrices.swapaxes(0, 1), added.reshape(batch, count, *added.shape[1:]).swapaxes(0, 1))
    _, states = lax.scan(step, initial, splits, reverse=reverse)
    return states.swapaxes(0, 1).reshape(added.shape)


def initial_states(
    final_of: Callable[[jax.Array, jax.Array], jax.Array], v: jax.Array, initial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the state that every split starts from [B P, H, K, V], and M of every split [B, P, H, K, K].

    The state after a split is linear in the state before it, S' = M S + N: N is the result of the split started from
    zeros, M that of the split started from the identity with all values zero.

    Args:
        final_of: (values, states before the splits) -> states after them; batch and splits are one axis.
        v: [B P, T / P, H, V].
        initial: initial state of the whole sequences [B, H, K, V] float32.
    """
    batch, heads, key_dim, value_dim = initial.shape
    count, length = v.shape[0] // batch, v.shape[1]
    from_zeros = final_of(v, jnp.zeros((batch * count, heads, key_dim, value_dim), jnp.float32))
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=jnp.float32), (batch * count, heads, key_dim, key_dim))
    matrices = final_of(jnp.zeros((batch * count, length, heads, key_dim), v.dtype), identity)
    matrices = matrices.reshape(batch, count, heads, key_dim, key_dim)
    return _chain("bhij,bhjv->bhiv", matrices, from_zeros, initial), matrices


def final_state_gradients(matrices: jax.Array, from_zeros: jax.Array, d_final: jax.Array) -> jax.Array:
    """Return the gradient of the state that every split ends with [B P, H, K, V].

    Args:
        matrices: M of every split [B, P, H, K, K].
        from_zeros: gradient of the state that every split starts from, given a zero gradient of the state that it ends
            with [B P, H, K, V].
        d_final: gradient of the final state of the whole sequences [B, H, K, V].
    """
    return _chain("bhji,bhjv->bhiv", matrices, from_zeros, d_final, reverse=True)


def input_gradients(inputs: Inputs, found: Sequence[jax.Array], *, erase: bool) -> Inputs:
    """Return the gradients of the inputs.

    Args:
        inputs: of the call.
        found: gradients of q, k (with erase) and w by value head, of v, beta, the initial state and log_decay if given.
        erase: as in the call; without it k gets none.
    """
    q, k, w, *_ = inputs
    count = 2 + erase
    d_keys, (d_v, d_beta, d_initial, *d_decays) = found[:count], found[count:]
    d_log_decay = d_decays[0] if d_decays else None
    d_q, d_w = per_key_head(d_keys[0], q), per_key_head(d_keys[-1], k if w is None else w)
    d_k = per_key_head(d_keys[1], k) if erase else jnp.zeros_like(k)
    if w is None:
        return Inputs(d_q, d_k + d_w, None, d_v, d_beta, d_log_decay, d_initial)
    return Inputs(d_q, d_k, d_w, d_v, d_beta, d_log_decay, d_initial)
