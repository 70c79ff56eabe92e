"""From d_0 = 1 the feedback of unit keys is zero, so OSDN is DeltaNet: docs/theory.md, "Unit keys"."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support.theory import heads, one_hot_keys, unit_keys

pytestmark = pytest.mark.usefixtures("float64")


KEYS = {
    "isotropic": unit_keys,
    "condition 10,000": functools.partial(unit_keys, condition=1e4),
    "one-hot": one_hot_keys,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("keys", KEYS)
def test_trust_is_delta_net(keys, dtype):
    """Bit for bit: rounding moves 1 − ⟨1,u⟩ by less than η = 0.003 would need to change d = 1."""
    for size, tokens in ((4, 60), (64, 500)):
        rng = np.random.default_rng(size)
        shape = (2, tokens, size)
        k = KEYS[keys](rng, shape)
        q, k, v, beta = (x.astype(dtype) for x in heads(k, k, rng.normal(size=shape), rng.uniform(0, 1, shape[:2])))
        o, state = ops.osdn(q, k, v, beta=beta, **ops.hypergradient_preset("trust"))
        expected, delta_net = ops.delta_net(q, k, v, beta=beta)
        assert o.dtype == dtype
        np.testing.assert_array_equal(o, expected)
        np.testing.assert_array_equal(state.recurrent, delta_net.recurrent)
        np.testing.assert_array_equal(state.preconditioner, 1.0)


@pytest.mark.parametrize("eta", [0.003, 0.3, 1.0])
def test_any_step_size_stays_there_up_to_rounding(eta):
    rng = np.random.default_rng(0)
    (k,) = heads(unit_keys(rng, (2, 500, 32), condition=100.0))
    d, _ = ops.hypergradient_preconditioner(k, eta=eta, initial=1.0)
    np.testing.assert_allclose(d, 1.0, rtol=0, atol=1e-14)


@pytest.mark.parametrize("change", ["beta-aware", "longer keys", "forgetting toward 0", "initial 0.9"])
def test_each_condition_is_needed(change):
    rng = np.random.default_rng(1)
    (k, beta) = heads(unit_keys(rng, (1, 200, 16)), np.full((1, 200), 0.5))
    options = dict(ops.hypergradient_preset("trust"))
    if change == "longer keys":
        k = 1.1 * k
    elif change == "forgetting toward 0":
        options["log_forget"] = jnp.full((1, 200, 1), np.log(0.99))
    elif change == "initial 0.9":
        options["initial"] = 0.9
    d, _ = ops.hypergradient_preconditioner(k, beta if change == "beta-aware" else None, **options)
    assert np.max(np.abs(d - 1)) > 0.01


def test_forgetting_toward_one_changes_nothing():
    """With the anchor 1, as in os_gdn and os_kda, d = 1 stays the fixed point."""
    rng = np.random.default_rng(2)
    (k, forget) = heads(unit_keys(rng, (1, 200, 16)), np.log(rng.uniform(0, 1, size=(1, 200))))
    d, _ = ops.hypergradient_preconditioner(k, log_forget=forget, anchor=1.0, **ops.hypergradient_preset("trust"))
    np.testing.assert_allclose(d, 1.0, rtol=0, atol=1e-15)
