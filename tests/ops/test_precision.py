"""Inputs of 32 and 16 bits, with x64 disabled as users run them, against the scan in float64 on the same inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import assert_close, jit, value_and_gradient
from support.cases import DELTA, NAMED, delta, unit

pytestmark = pytest.mark.slow

TOKENS = {"q", "k", "v", "write_key"}  # computed in 16 bits by a model; gates, beta and states are float32


def compare(case, implementations, dtype, tolerance):
    """Compare types, values and gradients; cotangents are rounded, too, so that both sides get the same ones."""
    arrays = {name: jnp.asarray(x, dtype if name in TOKENS else jnp.float32) for name, x in case.arrays.items()}
    dtypes = dict.fromkeys(case.operator.outputs, jnp.float32)
    if case.operator is DELTA:
        dtypes["o"] = dtype
    rng = np.random.default_rng(1)
    cotangents = {name: jnp.asarray(rng.normal(size=case.expected[name].shape), dtypes[name]) for name in dtypes}
    with jax.enable_x64(True):
        wide = dataclasses.replace(case, arrays=in_float64(arrays))
        want = jit(value_and_gradient(wide.run("scan")))(wide.arrays, in_float64(cotangents))
    for implementation in implementations:
        value, gradient = jit(value_and_gradient(case.run(implementation)))(arrays, cotangents)
        assert {name: x.dtype for name, x in value.items()} == dtypes
        assert {name: x.dtype for name, x in gradient.items()} == {name: x.dtype for name, x in arrays.items()}
        for got, expected in zip((value, gradient), want, strict=True):
            for array_dtype, limit in {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(dtype): tolerance}.items():
                # With 16-bit tokens, the float32 arrays show that states, sums and gates were not rounded.
                names = [name for name, x in got.items() if x.dtype == array_dtype]
                assert_close(in_float64({n: got[n] for n in names}), {n: expected[n] for n in names}, limit)


def in_float64(arrays):
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


@pytest.mark.parametrize(
    ("name", "implementations"),
    [
        ("delta: scalar decays of 0 and -20", ["chunk"]),
        ("delta: channel decays of 0 and -20", ["scan", "chunk"]),
        ("hypergradient: all options", ["scan", "chunk"]),
        ("gram: decays of 0 and -20", ["chunk"]),
    ],
)
def test_float32(name, implementations):
    compare(NAMED[name], implementations, jnp.float32, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "implementations"),
    [(jnp.bfloat16, ["scan", "chunk"]), (jnp.float16, [None])],
    ids=["bfloat16", "float16"],
)
def test_16_bits(dtype, implementations):
    compare(NAMED["delta: scalar decay, write key per value head"], implementations, dtype, 1e-2)


def test_preconditioner_of_16_bit_keys():
    compare(NAMED["hypergradient: all options"], ["chunk"], jnp.bfloat16, 1e-2)


def _nearly_parallel(x, rng):
    one = rng.normal(size=(1, 1, *x["k"].shape[2:]))
    x["k"] = unit(unit(one) + 0.01 * unit(rng.normal(size=x["k"].shape)))
    x["beta"] = np.full_like(x["beta"], 0.95)


@pytest.mark.parametrize("decay", [None, "channel"])
def test_nearly_parallel_keys(decay):
    """I + A is far from the identity: a truncated or factored series for its inverse would fail."""
    shape = {"length": 193, "key_dim": 64, "value_dim": 16, "heads": 2, "batch": 1, "chunk_size": None}
    compare(delta("", change=_nearly_parallel, decay=decay, **shape), ["chunk"], jnp.float32, 1e-4)
