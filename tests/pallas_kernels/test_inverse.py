"""The inverse on the tensor cores and the 16-bit halves of float32 matrices, in Mosaic GPU's interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.inverse import SCRATCH, times_inverse, unit_lower_inverse
from pallas_kernels.common.launch import launch
from pallas_kernels.common.tiles import read_global, smem, split
from support.cases import unit
from support.interpreter import assert_no_races

MATRIX = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def interpreted(body, out, scratch, **inputs):
    """Return the results of body(source, target, shared), by name."""
    with assert_no_races():
        entry = lambda index, *refs: body(*refs)
        inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
        return launch(entry, "probe", inputs=inputs, out=out, scratch=scratch, grid={"block": 1}, interpret=True)


def error(x, want):
    return np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("noise", [1.0, 0.01])
def test_inverse_and_a_product_with_it(noise):
    def body(source, target, shared):
        target.inverse[...] = unit_lower_inverse(read_global(source.a), shared)
        target.product[...] = times_inverse(read_global(source.p), shared)

    rng = np.random.default_rng(0)
    k = unit(rng.normal(size=64) * (noise < 1.0) + noise * rng.normal(size=(64, 64)))
    a, p = (0.95 * k @ k.T).astype(np.float32), rng.normal(size=(64, 64)).astype(np.float32)
    found = interpreted(body, {"inverse": MATRIX, "product": MATRIX}, SCRATCH, a=a, p=p)
    want = np.linalg.inv(np.eye(64) + np.tril(a.astype(np.float64), -1))
    assert error(found.inverse, want) < 2e-5
    assert error(found.product, p @ want) < 2e-5


def halves(value, dtype):
    def body(source, target, shared):
        split(read_global(source.x), shared.high, shared.low)
        target.high[...], target.low[...] = shared.high[...], shared.low[...]

    names = ("high", "low")
    out, scratch = (dict.fromkeys(names, x) for x in (jax.ShapeDtypeStruct((64, 64), dtype), smem(64, 64, dtype=dtype)))
    found = interpreted(body, out, scratch, x=value)
    return [np.asarray(half.astype(jnp.float32)) for half in (found.high, found.low)]


@pytest.mark.parametrize(("dtype", "digits"), [(jnp.bfloat16, 17), (jnp.float16, 21)])
def test_two_halves_hold_twice_the_digits(dtype, digits):
    x = np.random.default_rng(0).uniform(1, 2, size=(64, 64)).astype(np.float32)
    high, low = halves(x, dtype)
    assert np.max(np.abs(high - x)) <= 2.0 ** -(digits // 2)
    assert np.max(np.abs(high + low - x) / np.abs(x)) < 2.0**-digits


def test_halves_of_non_finite_elements_are_non_finite():
    x = np.ones((64, 64), np.float32)
    x[0, :3] = np.inf, -np.inf, np.nan
    x[1, 0] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)  # a GPU's own NaN
    high, low = halves(x, jnp.bfloat16)
    np.testing.assert_array_equal(np.isfinite(high + low), np.isfinite(x))
