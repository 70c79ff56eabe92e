"""Keep NaN and infinities inside their packed segment.

Products over a chunk mask other segments with zeros, and 0 * NaN is NaN: one segment that is not finite would reach its
neighbours. The scan selects instead of multiplying and has no such leak. So the result of a fast form is kept if all of
it is finite, and recomputed with the scan otherwise. No value is ever replaced: inside its own segment NaN stays NaN.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from osdn_jax.ops import sequence_parallel

PyTree = Any
Run = Callable[[PyTree, PyTree], PyTree]  # (floating-point inputs, resets) -> results


def contained(fast: Run, exact: Run, inputs: PyTree, resets: PyTree) -> PyTree:
    """Return fast(inputs, resets), or exact(inputs, resets) if that result, or its gradient, is not finite.

    Args:
        fast: a function whose non-finite values may leave their segment.
        exact: the same function, without that leak.
        inputs: floating-point arrays; the gradient is with respect to these.
        resets: [B, T] bool, True at the first token of every segment but the first; None means one segment per row,
            which has no other to leak into.
    """
    if resets is None:
        return fast(inputs, None)
    # Under jax.shard_map the axes that a loop's carry varies over must not change.
    axes = sequence_parallel.axes_of((inputs, resets))
    return _contained(fast, exact, *sequence_parallel.vary((inputs, resets), axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contained(fast: Run, exact: Run, inputs: PyTree, resets: PyTree) -> PyTree:
    results = fast(inputs, resets)
    return _unless(exact, all_finite(results), results, (inputs, resets))


def _contained_fwd(fast: Run, exact: Run, inputs: PyTree, resets: PyTree) -> tuple[PyTree, Any]:
    results, pull = jax.vjp(lambda x: fast(x, resets), inputs)
    finite = all_finite(results)
    results = _unless(exact, finite, results, (inputs, resets))
    return results, (pull, finite, inputs, resets)


def _contained_bwd(fast: Run, exact: Run, saved: Any, cotangents: PyTree) -> tuple[PyTree, None]:
    pull, finite, inputs, resets = saved
    (gradients,) = pull(cotangents)

    def exact_gradient(inputs: PyTree, resets: PyTree, cotangents: PyTree) -> PyTree:
        _, pull = jax.vjp(lambda x: _typed_as(cotangents, exact(x, resets)), inputs)
        return pull(cotangents)[0]

    finite &= all_finite(gradients)
    return _unless(exact_gradient, finite, gradients, (inputs, resets, cotangents)), None


_contained.defvjp(_contained_fwd, _contained_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unless(exact: Callable[..., PyTree], finite: jax.Array, results: PyTree, arguments: tuple[PyTree, ...]) -> PyTree:
    """Return results if finite, else exact(*arguments): a loop of at most one iteration.

    XLA updates the carry of a loop in place; it would copy the results of a `lax.cond`.
    """

    def iterate(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        finite, results = carry
        # Without the barrier this is loop-invariant, and XLA would compute it before the loop.
        finite, inside = lax.optimization_barrier((finite, arguments))
        return ~finite, _typed_as(results, exact(*inside))

    return lax.while_loop(lambda carry: ~carry[0], iterate, (finite, results))[1]


@_unless.defjvp
def _unless_jvp(exact: Callable[..., PyTree], primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    """Differentiate by a branch, for second derivatives: a while loop has no reverse-mode gradient."""
    finite, results, arguments = primals
    _, d_results, d_arguments = tangents

    def d_exact() -> PyTree:
        return _typed_as(results, jax.jvp(exact, arguments, d_arguments)[1])

    return _unless(exact, *primals), lax.cond(finite, lambda: d_results, d_exact)


def _typed_as(like: PyTree, results: PyTree) -> PyTree:
    """Cast results to the types of like: kernels may return another type than the scan."""
    return jax.tree.map(lambda x, y: y.astype(x.dtype), like, results)


def all_finite(tree: PyTree) -> jax.Array:
    """Return True if every value of the floating-point arrays is finite; under vmap, those of the whole batch.

    With an answer per row, vmap would turn the choice into a selection and compute both forms every time.
    """
    return _all_finite(lax.stop_gradient(tree))


@jax.custom_batching.custom_vmap
def _all_finite(tree: PyTree) -> jax.Array:
    # Sums over rows, of 0 or NaN, are vectorised on a CPU; a test of every value is not.
    finite = [jnp.all(jnp.isfinite(jnp.sum(jnp.atleast_1d(x) * 0, axis=-1))) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, finite, jnp.asarray(True))


@_all_finite.def_vmap
def _all_finite_of_batch(axis_size: int, in_batched: PyTree, tree: PyTree) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _all_finite(tree), False


def scan_in_blocks(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: PyTree, tokens: PyTree, sizes: tuple[int, ...] = (64, 8)
) -> tuple[PyTree, PyTree]:
    """Run `lax.scan` with a gradient that saves the carry before each block of tokens and recomputes the rest.

    Blocks are nested, so T / 64 + 8 + 8 carries are held at a time instead of T.

    Args:
        step: as of `lax.scan`; a token of zeros must not change the carry, since zeros pad the last block.
        carry: the carry before the first token.
        tokens: arrays [T, ...].
        sizes: tokens per block, and per block of that block.
    """
    length = jax.tree.leaves(tokens)[0].shape[0]
    if not sizes or length <= sizes[-1]:
        return lax.scan(step, carry, tokens)
    size, *smaller = sizes
    if length <= size:
        return scan_in_blocks(step, carry, tokens, tuple(smaller))

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(x.shape[0] // size, size, *x.shape[1:])  # no -1: an array may be empty

    @jax.checkpoint
    def block(carry: PyTree, tokens: PyTree) -> tuple[PyTree, PyTree]:
        return scan_in_blocks(step, carry, tokens, tuple(smaller))

    carry, out = lax.scan(block, carry, jax.tree.map(split, tokens))
    return carry, jax.tree.map(lambda x: x.reshape(x.shape[0] * size, *x.shape[2:])[:length], out)
