"""Helpers shared by the tests: comparison of arrays, compilation with little optimisation, random arrays."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["assert_close", "jit", "random_like", "relative_error", "value_and_gradient"]


def relative_error(got, want):
    """Return ‖got − want‖ / ‖want‖, ‖got‖ if want is zero, or infinity if the error is not finite."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    norm = np.linalg.norm(want)
    error = np.linalg.norm(got - want) / (norm if norm > 0 else 1.0)
    return float(error) if np.isfinite(error) else np.inf


def assert_close(got, want, tolerance):
    """Assert that every array of the tree `got` is within the relative tolerance of the same array in `want`."""
    got, treedef = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_treedef = jax.tree.flatten(want)
    assert treedef == want_treedef
    pairs = zip(got, want_leaves, strict=True)
    errors = {jax.tree_util.keystr(path): relative_error(x, y) for (path, x), y in pairs}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


def jit(f):
    """Return jax.jit(f) with little optimisation of the machine code: compilation takes most of these tests' time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def value_and_gradient(f):
    """Return the function (x, cotangents of f(x)) -> (f(x), gradient with respect to x) for dicts of float arrays."""

    def program(x, cotangents):
        value, pull = jax.vjp(f, x)
        return value, pull(cotangents)[0]

    return program


def random_like(tree, seed, dtype=None):
    """Return independent normal samples in the shapes of the tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype or x.dtype), tree)
