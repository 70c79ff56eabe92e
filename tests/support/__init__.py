"""What the tests share: how numbers are compared, and how programs are compiled."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["assert_close", "jit", "random_like", "relative_error", "value_and_gradient"]


def relative_error(got, want):
    """‖got − want‖ / ‖want‖, or ‖got‖ where want is zero; infinite where a number is missing."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape
    norm = np.linalg.norm(want)
    error = np.linalg.norm(got - want) / (norm if norm > 0 else 1.0)
    return float(error) if np.isfinite(error) else np.inf


def assert_close(got, want, tolerance):
    """Every array of the tree `got` is within the tolerance of its namesake in `want`."""
    got, treedef = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_treedef = jax.tree.flatten(want)
    assert treedef == want_treedef
    pairs = zip(got, want_leaves, strict=True)
    errors = {jax.tree_util.keystr(path): relative_error(x, y) for (path, x), y in pairs}
    assert {name: error for name, error in errors.items() if error > tolerance} == {}


def jit(f):
    """jax.jit with little optimisation of the machine code: compiling is most of what these tests do."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def value_and_gradient(f):
    """A program (x, cotangents of f(x)) -> (f(x), their pullback to x), for dicts of floating-point arrays."""

    def program(x, cotangents):
        value, pull = jax.vjp(f, x)
        return value, pull(cotangents)[0]

    return program


def random_like(tree, seed, dtype=None):
    """Normal numbers in the shapes of the tree, each array with numbers of its own."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype or x.dtype), tree)
