"""A squash of the Gram preconditioner that is learned, from its neutral value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit
from support.cases import gram

pytestmark = pytest.mark.usefixtures("float64")

CASE = gram("gram", length=21, log_squash=(0.0, 0.0))


@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
def test_zeros_write_under_the_key_itself_and_have_the_only_gradient(implementation):
    def keys(x):
        return ops.gram_write_key(**x, implementation=implementation, chunk_size=8)[0]

    x = jax.tree.map(jnp.asarray, CASE.arrays)
    np.testing.assert_array_equal(jit(keys)(x), x["k"])
    gradient = jit(jax.grad(lambda x: jnp.sum(keys(x) * x["k"])))(x)
    assert np.all(np.abs(gradient["log_squash"]) > 0.1)
    for name in ("log_decay", "gain", "center", "initial"):
        np.testing.assert_array_equal(gradient[name], 0.0)


def test_equal_entries_are_a_number():
    arrays = {name: jnp.asarray(x) for name, x in CASE.arrays.items() if name != "log_squash"}
    number = ops.gram_preconditioner(**arrays, squash=1.7)
    assert_close(ops.gram_preconditioner(**arrays, log_squash=jnp.full(3, np.log(1.7))), number, 1e-14)


def test_keys_in_bfloat16():
    x = {name: jnp.asarray(a, jnp.bfloat16 if name == "k" else jnp.float32) for name, a in CASE.arrays.items()}
    write_key, final = ops.gram_write_key(**x | {"log_squash": jnp.full(3, np.log(1.7), jnp.float32)})
    assert (write_key.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(
        write_key, ops.gram_write_key(**{k: v for k, v in x.items() if k != "log_squash"}, squash=1.7)[0], 1e-2
    )
