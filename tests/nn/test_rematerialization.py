"""Rematerialisation: the same numbers from less memory, for every rule."""

import math

import jax
import jax.numpy as jnp
import pytest

from support import assert_close, jit, random_like
from support.models import SEGMENTS, every_rule, model_config, parameters_of, tokens


def functions(rule, **changes):
    """Return {remat: parameters -> features of packed documents under dropout}, and parameters."""
    made = {}
    for remat in ("none", "blocks", "full"):
        apply, parameters = parameters_of(model_config(rule, remat=remat, dropout=0.25, **changes))

        def features(p, apply=apply):
            options = {"segment_ids": jnp.asarray(SEGMENTS), "dropout_key": jax.random.key(0)}
            return apply(p, jnp.asarray(tokens()), method="features", **options)[0]

        made[remat] = features
    return made, parameters


def kept(function, parameters):
    """Return the bytes of the forward pass that the gradient of a function keeps, without the parameters."""
    pull = jax.eval_shape(lambda p: jax.vjp(function, p)[1], parameters)
    count = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(pull))
    return count - sum(x.nbytes for x in parameters.values())


@pytest.mark.slow
@pytest.mark.parametrize("rule", every_rule)
def test_less_is_kept_of_every_rule(rule):
    made, parameters = functions(rule)
    none, blocks, full = (kept(made[remat], parameters) for remat in ("none", "blocks", "full"))
    assert full < 0.6 * blocks
    assert blocks < 0.6 * none


# Together they cover every option of a rule: decay and gates per channel, both preconditioners, and none of these.
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["linear_attention", "gdn2", "osdn", "pdn"])
def test_numbers_are_the_same(rule):
    made, parameters = functions(rule)
    cotangent = random_like(jax.eval_shape(made["none"], parameters), 1)

    def value_and_gradient(function):
        def program(p):
            value, pull = jax.vjp(function, p)
            return value, pull(cotangent)[0]

        return jit(program)(parameters)

    want = value_and_gradient(made["none"])
    for remat in ("blocks", "full"):
        got = value_and_gradient(made[remat])
        assert_close(got[0], want[0], 1e-6)
        assert_close(got[1], want[1], 1e-5)


@pytest.mark.slow
def test_the_compiled_program_needs_less_memory():
    made, parameters = functions("linear_attention", layers=3)
    needs = {}
    for remat in ("none", "full"):
        gradient = jax.jit(jax.grad(lambda p, f=made[remat]: jnp.sum(jnp.square(f(p)))))
        needs[remat] = gradient.lower(parameters).compile().memory_analysis().temp_size_in_bytes
    assert needs["full"] < 0.8 * needs["none"]
