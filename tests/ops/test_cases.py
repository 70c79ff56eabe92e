"""Every operator and implementation against the NumPy oracle, in float64: values, and gradients for every array."""

import numpy as np
import pytest

from support import assert_close, jit, oracle
from support.cases import CASES, IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case, implementation):
    if implementation is None:
        assert_close(jit(case.run(None))(case.arrays), case.expected, TOLERANCE)
        return
    value, gradient = case.by_scan if implementation == "scan" else case.value_and_gradient(implementation)
    assert_close(value, case.expected, TOLERANCE)
    if implementation == "scan":
        check_gradient_by_oracle(case, gradient)
    else:
        assert_close(gradient, case.by_scan[1], TOLERANCE)


def check_gradient_by_oracle(case, gradient):
    """Assert that the gradient along one random direction per array is the oracle's derivative by the complex step."""
    rng = np.random.default_rng(2)
    for name, x in case.arrays.items():
        direction = rng.normal(size=x.shape)
        moved = oracle.derivative(case.by_oracle, case.arrays, {name: direction})
        want = sum(np.vdot(case.cotangents[key], moved[key]) for key in moved)
        size = np.linalg.norm(direction) * np.linalg.norm(gradient[name])
        assert abs(np.vdot(gradient[name], direction) - want) <= TOLERANCE * max(size, 1.0), name
