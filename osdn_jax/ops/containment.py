"""Packed documents that are not finite stay alone.

Products over a chunk mask other documents with zeros, and 0 * NaN is NaN: one document that is not finite would reach
its neighbours. The specification selects instead of multiplying and has no such leak. So what a fast form computed is
kept while all of it is finite, and computed again by the specification where it is not. No number is ever replaced:
inside its own document NaN stays NaN.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import collectives

PyTree = Any
Run = Callable[[PyTree, PyTree], PyTree]  # (floating-point inputs, where documents start) -> results


def contained(fast: Run, exact: Run, inputs: PyTree, starts: PyTree) -> PyTree:
    """fast(inputs, starts), or where that or its gradient is not finite, the same by exact.

    Args:
        fast: may mix documents in what is not finite.
        exact: computes the same function and mixes nothing.
        inputs: floating-point arrays; the gradient is for these.
        starts: what says where documents start, arrays without a gradient; None is one document a row, which there is
            nothing to keep from.
    """
    if starts is None:
        return fast(inputs, None)
    axes = collectives.axes_of((inputs, starts))  # of a jax.shard_map: what a loop carries keeps what it varies over
    return _contained(fast, exact, *collectives.vary((inputs, starts), axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contained(fast: Run, exact: Run, inputs: PyTree, starts: PyTree) -> PyTree:
    results = fast(inputs, starts)
    return _unless(exact, all_finite(results), results, (inputs, starts))


def _contained_fwd(fast: Run, exact: Run, inputs: PyTree, starts: PyTree) -> tuple[PyTree, Any]:
    results, pull = jax.vjp(lambda x: fast(x, starts), inputs)
    finite = all_finite(results)
    results = _unless(exact, finite, results, (inputs, starts))
    return results, (pull, finite, inputs, starts)


def _contained_bwd(fast: Run, exact: Run, saved: Any, cotangents: PyTree) -> tuple[PyTree, None]:
    pull, finite, inputs, starts = saved
    (gradients,) = pull(cotangents)

    def again(inputs: PyTree, starts: PyTree, cotangents: PyTree) -> PyTree:
        _, pull = jax.vjp(lambda x: _typed_as(cotangents, exact(x, starts)), inputs)
        return pull(cotangents)[0]

    finite &= all_finite(gradients)
    return _unless(again, finite, gradients, (inputs, starts, cotangents)), None


_contained.defvjp(_contained_fwd, _contained_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unless(again: Callable[..., PyTree], finite: jax.Array, results: PyTree, arguments: tuple[PyTree, ...]) -> PyTree:
    """The results where they are finite, else again(*arguments): a loop of at most one turn.

    XLA keeps what a loop carries where it is; what the branches of a `lax.cond` return it would copy.
    """

    def turn(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        finite, results = carry
        # Without the barrier nothing here changes from turn to turn, and XLA would compute it before the loop.
        finite, now = lax.optimization_barrier((finite, arguments))
        return ~finite, _typed_as(results, again(*now))

    return lax.while_loop(lambda carry: ~carry[0], turn, (finite, results))[1]


@_unless.defjvp
def _unless_jvp(again: Callable[..., PyTree], primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    """For second derivatives: a loop has no gradient in reverse, a branch has."""
    finite, results, arguments = primals
    _, d_results, d_arguments = tangents

    def d_again() -> PyTree:
        return _typed_as(results, jax.jvp(again, arguments, d_arguments)[1])

    return _unless(again, *primals), lax.cond(finite, lambda: d_results, d_again)


def _typed_as(like: PyTree, results: PyTree) -> PyTree:
    """Kernels may return another type than the specification does."""
    return jax.tree.map(lambda x, y: y.astype(x.dtype), like, results)


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of the floating-point arrays is finite; under vmap, those of the whole batch.

    One answer for all keeps the choice a choice: with an answer for each row, vmap would compute both forms every time.
    """
    return _all_finite(lax.stop_gradient(tree))


@jax.custom_batching.custom_vmap
def _all_finite(tree: PyTree) -> jax.Array:
    # Sums over rows, of 0 or NaN, are vectorised on a CPU; a test of every number is not.
    finite = [jnp.all(jnp.isfinite(jnp.sum(jnp.atleast_1d(x) * 0, axis=-1))) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, finite, jnp.asarray(True))


@_all_finite.def_vmap
def _all_finite_of_batch(axis_size: int, in_batched: PyTree, tree: PyTree) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _all_finite(tree), False


def scan_in_blocks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: PyTree, tokens: PyTree, sizes: tuple[int, ...] = (64, 8)
) -> tuple[PyTree, PyTree]:
    """`lax.scan` whose gradient keeps the carry before every block of tokens and computes the rest again.

    Blocks are cut into blocks likewise: the carries held at a time are T / 64 + 8 + 8 instead of T.

    Args:
        step: as of `lax.scan`; a token of zeros must leave the carry as it is, for they fill the last block.
        carry: before the first token.
        tokens: arrays [T, ...].
        sizes: tokens in a block, and in the blocks that it is cut into.
    """
    length = jax.tree.leaves(tokens)[0].shape[0]
    if not sizes or length <= sizes[-1]:
        return lax.scan(step, carry, tokens)
    size, *smaller = sizes
    if length <= size:
        return scan_in_blocks(step, carry, tokens, tuple(smaller))

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(x.shape[0] // size, size, *x.shape[1:])  # no -1: an array may be empty

    @jax.checkpoint
    def block(carry: PyTree, tokens: PyTree) -> tuple[PyTree, PyTree]:
        return scan_in_blocks(step, carry, tokens, tuple(smaller))

    carry, out = lax.scan(block, carry, jax.tree.map(cut, tokens))
    return carry, jax.tree.map(lambda x: x.reshape(x.shape[0] * size, *x.shape[2:])[:length], out)
