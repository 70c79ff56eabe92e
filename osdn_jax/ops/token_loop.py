"""A recurrence over tokens in the form that suits a CPU: arrays are read and written in place, token by token.

A recurrence of vectors has little arithmetic, so memory takes its time. `lax.scan` moves the time axis of every input
and output to the front, and its gradient keeps the intermediate values of every token. Here nothing is transposed, and
the gradient keeps the state before each block of tokens; a block is computed again just before it is needed, so that
its values stay in the caches.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import sequence_parallel

PyTree = Any
# (state, token, constants, reset) -> (state after the token, output)
Step = Callable[[jax.Array, PyTree, PyTree, jax.Array | None], tuple[jax.Array, jax.Array]]

_BLOCK = 32  # tokens


def loop_tokens(
    step: Step, state: jax.Array, tokens: PyTree, constants: PyTree, resets: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Run step over all tokens, with a gradient in reverse mode only.

    Args:
        step: computes one token; it gets tokens and resets without their time axis.
        state: the state before the first token, [B, ...].
        tokens: floating-point arrays [B, T, ...], T at least 1.
        constants: floating-point arrays that every token reads.
        resets: [B, T] bool or None.

    Returns:
        (outputs [B, T, ...], state after the last token).
    """
    arguments = (state, tokens, constants, resets)
    # Under jax.shard_map the axes that a loop's carry varies over must not change.
    return _loop_tokens(step, *sequence_parallel.vary(arguments, sequence_parallel.axes_of(arguments)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loop_tokens(step: Step, state: jax.Array, tokens: PyTree, constants: PyTree, resets: jax.Array | None) -> Any:
    return _forward(step, state, tokens, constants, resets)[0]


def _forward(step: Step, state: jax.Array, tokens: PyTree, constants: PyTree, resets: jax.Array | None) -> Any:
    """Return ((outputs, final state), what the gradient needs)."""
    length = jax.tree.leaves(tokens)[0].shape[1]

    def advance(t: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        token, reset = _at((tokens, resets), t)
        return step(state, token, constants, reset)

    def body(t: jax.Array, carry: Any) -> Any:
        state, out, starts = carry
        starts = _put(starts, state, (t + _BLOCK - 1) // _BLOCK, axis=0)  # the last write is the block's first token's
        state, value = advance(t, state)
        return state, _put(out, value, t), starts

    _, value = jax.eval_shape(lambda: advance(0, state))
    out = _zeros_like(state, (value.shape[0], length, *value.shape[1:]), value.dtype)
    starts = _zeros_like(state, (_blocks(length) + 1, *state.shape))
    state, out, starts = lax.fori_loop(0, length, body, (state, out, starts))
    return (out, state), (tokens, constants, resets, starts)


def _backward(step: Step, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    tokens, constants, resets, starts = saved
    d_out, d_state = cotangents
    length = d_out.shape[1]
    count = _blocks(length)

    def body(i: jax.Array, carry: Any) -> Any:
        block = count - 1 - i
        first = block * _BLOCK

        def forward(i: jax.Array, carry: Any) -> Any:
            state, states = carry
            t = first + i
            token, reset = _at((tokens, resets), t)
            return step(state, token, constants, reset)[0], _put(states, state, i, axis=0)

        def backward(i: jax.Array, carry: Any) -> Any:
            d_state, d_tokens, d_constants = carry
            i = _BLOCK - 1 - i
            t = first + i
            token, reset = _at((tokens, resets), t)

            def differentiable(state: jax.Array, token: PyTree, constants: PyTree) -> Any:
                return step(state, token, constants, reset)

            _, pull = jax.vjp(differentiable, _at(states, i, axis=0), token, constants)
            d_before, d_token, d_here = pull((d_state, _at(d_out, t)))
            d_here = jax.tree.map(jnp.add, d_constants, d_here)
            if length % _BLOCK:  # indices beyond the last token read and write that token; it is written last
                valid = t < length
                d_before, d_here = jax.tree.map(
                    lambda new, old: jnp.where(valid, new, old), (d_before, d_here), (d_state, d_constants)
                )
            return d_before, jax.tree.map(lambda x, y: _put(x, y, t), d_tokens, d_token), d_here

        states = _zeros_like(starts, (_BLOCK, *starts.shape[1:]))
        _, states = lax.fori_loop(0, _BLOCK, forward, (_at(starts, block, axis=0), states))
        return lax.fori_loop(0, _BLOCK, backward, carry)

    carry = (d_state, *jax.tree.map(jnp.zeros_like, (tokens, constants)))
    d_state, d_tokens, d_constants = lax.fori_loop(0, count, body, carry)
    return d_state, d_tokens, d_constants, None


_loop_tokens.defvjp(_forward, _backward)


def _blocks(length: int) -> int:
    return -(-length // _BLOCK)


def _at(tree: PyTree, index: Any, axis: int = 1) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, axis, keepdims=False), tree)


def _put(x: jax.Array, value: jax.Array, index: Any, axis: int = 1) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, index, axis)


def _zeros_like(x: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """Return zeros that vary over the mesh axes of x."""
    return sequence_parallel.vary(jnp.zeros(shape, dtype or x.dtype), sequence_parallel.axes_of(x))
