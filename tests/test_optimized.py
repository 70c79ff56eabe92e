"""Every rule compiled as users compile it: tests/conftest.py has the other tests compile with little optimisation."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest

from osdn_jax import compare
from osdn_jax.compare import Shape
from support import relative_error

pytestmark = pytest.mark.slow

SHAPE = Shape(batch=2, length=70, key_heads=2, heads=4, key_dim=8, value_dim=6)


@contextlib.contextmanager
def full_optimization():
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@functools.cache
def case(rule):
    """Return the inputs, the cotangents, and the outputs and gradients of the float64 scan."""
    arrays = compare.draw_inputs(rule, SHAPE, "float32", 0)
    outputs = jax.eval_shape(compare.program(rule, None), arrays)
    cotangents = compare.draw_cotangents(outputs, "float32", 0)
    values, gradients = compare.reference(rule, arrays, cotangents)
    return arrays, cotangents, values | {f"d_{name}": x for name, x in gradients.items()}


@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
@pytest.mark.parametrize("rule", [name for name in compare.COMPARED_RULES if not name.endswith("_trust")])
def test_values_and_gradients(rule, implementation):
    arrays, cotangents, expected = case(rule)
    run = jax.jit(compare.value_and_gradient(compare.program(rule, implementation)))
    with full_optimization():
        values, gradients = run(*jax.tree.map(jnp.asarray, (arrays, cotangents)))
    got = values | {f"d_{name}": x for name, x in gradients.items()}
    assert got.keys() == expected.keys()
    errors = {name: relative_error(x, expected[name]) for name, x in got.items()}
    assert {name: e for name, e in errors.items() if e > compare.tolerance("float32", name)} == {}
