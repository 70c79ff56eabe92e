"""Helpers of all tests: comparison of arrays, and compilation of programs."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["assert_close", "jit", "random_like", "relative_error", "value_and_gradient"]


def relative_error(got, want):
    """Return ‖got − want‖ / ‖want‖, or ‖got‖ if want is zero; infinite if the error is not finite."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    norm = np.linalg.norm(want)
    error = np.linalg.norm(got - want) / (norm if norm > 0 else 1.0)
    return float(error) if np.isfinite(error) else np.inf


def assert_close(got, want, tolerance):
    """Assert that every array of the tree `got` is within the tolerance of that of the same name in `want`."""
    got, treedef = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_treedef = jax.tree.flatten(want)
    assert treedef == want_treedef
    pairs = zip(got, want_leaves, strict=True)
    errors = {jax.tree_util.keystr(path): relative_error(x, y) for (path, x), y in pairs}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


def jit(f):
    """Return jax.jit(f) with little optimisation of the machine code: compilation takes most of the tests' time."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def value_and_gradient(f):
    """Return a program (x, cotangents of f(x)) -> (f(x), their pullback to x), for dicts of floating-point arrays."""

    def program(x, cotangents):
        value, pull = jax.vjp(f, x)
        return value, pull(cotangents)[0]

    return program


def random_like(tree, seed, dtype=None):
    """Return normally distributed arrays with the shapes of the tree, different for each array."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype or x.dtype), tree)
