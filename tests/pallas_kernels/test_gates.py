"""Resets, in every notation, leave the decays next to them exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.token_gates import COARSE, FINE, FROM_START, LOWEST, TO_END, clamped, gates_of, two_sums
from pallas_kernels.hypergradient.chunk import TO_END as FORGOTTEN_TO_END
from pallas_kernels.hypergradient.chunk import make_gates

RESETS = [-np.inf, -1e9, -1e6, float(np.finfo(np.float32).min)]


def test_a_reset_is_clamped_and_has_no_gradient():
    x = jnp.array([*RESETS, -999.0, -1.0, 0.0, 2.0])
    value, pull = jax.vjp(clamped, x)
    np.testing.assert_array_equal(value, [LOWEST] * 4 + [-999.0, -1.0, 0.0, 2.0])
    np.testing.assert_array_equal(pull(jnp.full(8, 3.0))[0], [0.0] * 4 + [3.0] * 4)
    assert jnp.exp(LOWEST) == 0


def test_nan_stays_nan():
    value, pull = jax.vjp(clamped, jnp.array([jnp.nan, -jnp.inf]))
    assert np.isnan(value[0])
    assert value[1] == LOWEST
    np.testing.assert_array_equal(pull(jnp.ones(2))[0], [1.0, 0.0])


@pytest.mark.parametrize("count", [1, 31, 60])
def test_a_difference_of_sums_is_exact_next_to_resets(count):
    log_decay = -np.random.default_rng(0).uniform(0.005, 0.015, size=64).astype(np.float32)
    log_decay[:count] = -np.inf
    coarse, fine = two_sums(clamped(jnp.asarray(log_decay)))
    got = (coarse[-1] - coarse[count]) + (fine[-1] - fine[count])
    np.testing.assert_allclose(got, np.sum(log_decay[count + 1 :], dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("reset", RESETS)
def test_the_gates_next_to_a_reset(reset):
    log_decay = np.full(64, -0.01, np.float32)
    log_decay[20] = reset
    rows = clamped(jnp.asarray(log_decay)[None, :, None])
    ones = jnp.ones((1, 64, 1))
    gates, forgetting = gates_of(ones, rows, None)[0, 0, 0], make_gates(ones, ones, rows, None)[0, 0, 0]
    left = np.exp(-0.01 * np.arange(1, 65))
    np.testing.assert_allclose(gates[FROM_START], np.where(np.arange(64) < 20, left, 0.0), rtol=1e-6)
    to_end = np.where(np.arange(64) >= 20, np.exp(-0.01 * (63 - np.arange(64))), 0.0)
    for end in (gates[TO_END], forgetting[FORGOTTEN_TO_END]):
        np.testing.assert_allclose(end, to_end, rtol=1e-6)
    assert np.isfinite(gates[COARSE]).all()
    assert np.isfinite(gates[FINE]).all()
