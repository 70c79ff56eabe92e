"""Inputs of 32 and 16 bits, as users run them (no doubles), against the scan in doubles on the same numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import assert_close, jit, value_and_gradient
from support.cases import DELTA, NAMED, delta, unit

TOKENS = {"q", "k", "v", "write_key"}  # what a model computes in 16 bits; gates, strengths and states are float32


def compare(case, implementations, dtype, tolerance):
    """Checks types, values and gradients. Cotangents are rounded too, so that both sides get the same numbers."""
    arrays = {name: jnp.asarray(x, dtype if name in TOKENS else jnp.float32) for name, x in case.arrays.items()}
    kinds = dict.fromkeys(case.operator.outputs, jnp.float32)
    if case.operator is DELTA:
        kinds["o"] = dtype
    rng = np.random.default_rng(1)
    cotangents = {name: jnp.asarray(rng.normal(size=case.expected[name].shape), kinds[name]) for name in kinds}
    with jax.enable_x64(True):
        wide = dataclasses.replace(case, arrays=doubles(arrays))
        want = jit(value_and_gradient(wide.run("scan")))(wide.arrays, doubles(cotangents))
    for implementation in implementations:
        value, gradient = jit(value_and_gradient(case.run(implementation)))(arrays, cotangents)
        assert {name: x.dtype for name, x in value.items()} == kinds
        assert {name: x.dtype for name, x in gradient.items()} == {name: x.dtype for name, x in arrays.items()}
        for got, expected in zip((value, gradient), want, strict=True):
            for kind, limit in {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(dtype): tolerance}.items():
                # Beside arrays of 16 bits, those of 32 show that memories, sums and gates have not been rounded.
                names = [name for name, x in got.items() if x.dtype == kind]
                assert_close(doubles({n: got[n] for n in names}), {n: expected[n] for n in names}, limit)


def doubles(arrays):
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


@pytest.mark.parametrize(
    ("name", "implementations"),
    [
        ("delta: scalar decays of 0 and -20", ["chunk"]),
        ("delta: channel decays of 0 and -20", ["scan", "chunk"]),
        ("hypergradient: everything", ["scan", "chunk"]),
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
    compare(NAMED["hypergradient: everything"], ["chunk"], jnp.bfloat16, 1e-2)


def _nearly_parallel(x, rng):
    one = rng.normal(size=(1, 1, *x["k"].shape[2:]))
    x["k"] = unit(unit(one) + 0.01 * unit(rng.normal(size=x["k"].shape)))
    x["beta"] = np.full_like(x["beta"], 0.95)


@pytest.mark.parametrize("decay", [None, "channel"])
def test_nearly_parallel_keys(decay):
    """(I + A) is far from the identity here: a truncated or factored series for its inverse is useless."""
    shape = {"length": 193, "key_dim": 64, "value_dim": 16, "heads": 2, "batch": 1, "chunk_size": None}
    compare(delta("", change=_nearly_parallel, decay=decay, **shape), ["chunk"], jnp.float32, 1e-4)
