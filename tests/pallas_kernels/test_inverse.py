"""The inverse on the tensor cores and the halves that float32 goes in as, in Mosaic GPU's interpreter."""

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


def interpreted(body, out, scratch, *arguments):
    with assert_no_races():
        entry = lambda _at, *refs: body(*refs)
        return launch(entry, "probe", out, {"block": 1}, scratch, True, [jnp.asarray(x) for x in arguments])


def error(x, want):
    return np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("noise", [1.0, 0.01])
def test_inverse_and_a_product_with_it(noise):
    def body(a, p, inverse, product, *scratch):
        inverse[...] = unit_lower_inverse(read_global(a), scratch)
        product[...] = times_inverse(read_global(p), scratch)

    rng = np.random.default_rng(0)
    k = unit(rng.normal(size=64) * (noise < 1.0) + noise * rng.normal(size=(64, 64)))
    a, p = (0.95 * k @ k.T).astype(np.float32), rng.normal(size=(64, 64)).astype(np.float32)
    inverse, product = interpreted(body, [MATRIX, MATRIX], SCRATCH, a, p)
    want = np.linalg.inv(np.eye(64) + np.tril(a.astype(np.float64), -1))
    assert error(inverse, want) < 2e-5
    assert error(product, p @ want) < 2e-5


def halves(value, dtype):
    def body(x, high, low, high_s, low_s):
        split(read_global(x), high_s, low_s)
        high[...], low[...] = high_s[...], low_s[...]

    tile = smem(64, 64, dtype=dtype)
    out = [jax.ShapeDtypeStruct((64, 64), dtype)] * 2
    return [np.asarray(half.astype(jnp.float32)) for half in interpreted(body, out, [tile, tile], value)]


@pytest.mark.parametrize(("dtype", "digits"), [(jnp.bfloat16, 17), (jnp.float16, 21)])
def test_two_halves_hold_twice_the_digits(dtype, digits):
    x = np.random.default_rng(0).uniform(1, 2, size=(64, 64)).astype(np.float32)
    high, low = halves(x, dtype)
    assert np.max(np.abs(high - x)) <= 2.0 ** -(digits // 2)
    assert np.max(np.abs(high + low - x) / np.abs(x)) < 2.0**-digits


def test_halves_of_what_is_not_finite_are_not():
    x = np.ones((64, 64), np.float32)
    x[0, :3] = np.inf, -np.inf, np.nan
    x[1, 0] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)  # a GPU's own NaN
    high, low = halves(x, jnp.bfloat16)
    np.testing.assert_array_equal(np.isfinite(high + low), np.isfinite(x))
