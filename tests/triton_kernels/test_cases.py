"""The list of cases of all operators by the Triton kernels against the scan: values and every gradient, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from support import assert_close, jit, random_like, value_and_gradient
from support.cases import CASES, SQUARES

TOLERANCE = 1e-5
KERNEL_CASES = [case for case in CASES if case.operator is not SQUARES]  # no kernel computes the squared keys


def last_row(case):
    """Return the case with the last row of its batch alone: the interpreter takes seconds per row."""
    batch = len(case.arrays["k"])
    arrays = {name: x[-1:] if name != "center" and len(x) == batch else x for name, x in case.arrays.items()}
    ids = None if case.segment_ids is None else case.segment_ids[-1:]
    return dataclasses.replace(case, arrays=arrays, segment_ids=ids, chunk_size=None)


@pytest.mark.parametrize("case", [last_row(case) for case in KERNEL_CASES], ids=lambda case: case.name)
def test_values_and_gradients(case):
    x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), case.arrays)
    cotangents = random_like(jax.eval_shape(case.run("scan"), x), seed=1)
    got = jax.jit(value_and_gradient(case.run("triton_interpret")))(x, cotangents)
    want = jit(value_and_gradient(case.run("scan")))(x, cotangents)
    assert_close(got, want, TOLERANCE)
