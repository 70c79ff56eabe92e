"""The recurrences as None runs them on a CPU: equal to the scan, whatever the number of tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit, random_like, value_and_gradient
from support.cases import ids

pytestmark = pytest.mark.usefixtures("float64")

B, H, K = 2, 2, 4
BOUNDS = (0.9, 1.05)  # the projection binds
HYPERGRADIENT = {"eta": 0.5, "bounds": BOUNDS, "restart": 1.0, "anchor": 0.97, "normalize": True}
OPERATORS = {
    "hypergradient": functools.partial(ops.hypergradient_write_key, **HYPERGRADIENT),
    "gram": functools.partial(ops.gram_write_key),
    "squares": functools.partial(ops.squares_write_key, average=0.9, normalize=True, restart=1.0),
}


def arrays(operator, length):
    rng = np.random.default_rng(0)
    x = {name: rng.uniform(0.1, 0.9, size=(B, length, H)) for name in ("beta", "log_forget")}
    x = {"beta": x["beta"], "log_forget": -0.1 * x["log_forget"]}
    if operator == "gram":
        x = {"gain": x["beta"], "log_decay": x["log_forget"], "center": rng.normal(size=H)}
    x = {} if operator == "squares" else x
    x |= {"k": rng.normal(size=(B, length, H, K)) / 2, "initial": rng.uniform(0.9, 1.05, size=(B, H, K))}
    return jax.tree.map(jnp.asarray, x)


@pytest.mark.parametrize("length", [1, 32, 75], ids=["one token", "whole block", "part of a block"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_equals_the_scan(operator, length):
    segments = jnp.asarray(ids(((5, 40), (12,)), B, length))
    x = arrays(operator, length)

    def run(implementation):
        return lambda x: OPERATORS[operator](**x, segment_ids=segments, implementation=implementation)

    cotangents = random_like(jax.eval_shape(run("scan"), x), seed=1)
    want, got = (jit(value_and_gradient(run(implementation)))(x, cotangents) for implementation in ("scan", None))
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens(operator):
    x = arrays(operator, 0)
    write_key, final = OPERATORS[operator](**x)
    assert write_key.shape == (B, 0, H, K)
    np.testing.assert_array_equal(final, x["initial"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradient_of_a_gradient(operator):
    x = arrays(operator, 34)

    def loss(k, implementation):
        write_key, final = OPERATORS[operator](**x | {"k": k}, implementation=implementation)
        return jnp.sum(jnp.sin(write_key)) + jnp.sum(final)

    def second(implementation):
        return jit(jax.grad(lambda k: jnp.sum(jnp.cos(jax.grad(loss)(k, implementation)))))(x["k"])

    assert_close(second(None), second("scan"), 1e-12)
