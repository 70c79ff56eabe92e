"""A preconditioned delta rule is a plain one with other keys: docs/theory.md, "Preconditioning scales the keys"."""

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support.theory import SIZES, heads, rotation, unit_keys

pytestmark = pytest.mark.usefixtures("float64")


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11 * np.max(np.abs(expected)))


@pytest.fixture(params=SIZES, ids=lambda size: f"K{size[0]}")
def x(request):
    size, value_size, tokens = request.param
    rng = np.random.default_rng(size)
    shape = (2, tokens, size)
    return {
        "rng": rng,
        "q": rng.normal(size=shape),
        "k": unit_keys(rng, shape, condition=10.0),
        "v": rng.normal(size=(2, tokens, value_size)),
        "beta": rng.uniform(0, 1, size=(2, tokens)),
        "state": rng.normal(size=(2, 1, size, value_size)),
    }


def test_fixed_diagonal_scales_keys_and_queries(x):
    """Write key D k is the plain rule for keys and queries scaled by D^1/2, with the state D^-1/2 S."""
    root = np.exp(x["rng"].normal(size=x["k"].shape[-1]) / 4)
    q, k, v, beta, decay = heads(x["q"], x["k"], x["v"], x["beta"], -x["rng"].uniform(0, 1, size=x["k"].shape))
    w, q_scaled, k_scaled = heads(root**2 * x["k"], root * x["q"], root * x["k"])
    initial, initial_scaled = (jnp.asarray(s) for s in (x["state"], x["state"] / root[:, None]))
    o, state = ops.delta_rule(q, k, v, beta, write_key=w, log_decay=decay, initial_state=initial)
    o_scaled, scaled = ops.kda(q_scaled, k_scaled, v, beta=beta, log_decay=decay, initial_state=initial_scaled)
    close(o, o_scaled)
    close(state, root[:, None] * np.asarray(scaled.recurrent))


def test_any_pair_of_keys_changes_basis_together(x):
    """With S = R Z, Z obeys the rule with read keys and queries R^T k, R^T q, and write keys R^-1 w."""
    size = x["k"].shape[-1]
    basis = rotation(x["rng"], size) @ np.diag(np.geomspace(0.5, 2, size)) @ rotation(x["rng"], size)
    w = 0.5 * unit_keys(x["rng"], x["k"].shape)
    run = lambda q, k, w, state: ops.delta_rule(
        *heads(q, k, x["v"], x["beta"]), write_key=heads(w)[0], initial_state=jnp.asarray(state)
    )
    o, state = run(x["q"], x["k"], w, x["state"])
    inverse = np.linalg.inv(basis)
    o_changed, state_changed = run(x["q"] @ basis, x["k"] @ basis, w @ inverse.T, inverse @ x["state"])
    np.testing.assert_allclose(o, o_changed, rtol=0, atol=1e-9 * np.max(np.abs(o)))
    np.testing.assert_allclose(state, basis @ np.asarray(state_changed), rtol=0, atol=1e-9 * np.max(np.abs(state)))


@pytest.mark.parametrize("preset", ["paper", "trust"])
def test_osdn_is_kda_with_a_decay_tied_to_d(x, preset):
    """A d that changes is a decay per channel, sqrt(d_{t-1} / d_t), of the state D_t^-1/2 S_t."""
    q, k, v, beta = heads(x["q"], x["k"], x["v"], x["beta"])
    settings = ops.hypergradient_preset(preset)
    o, state = ops.osdn(q, k, v, beta=beta, beta_aware=True, **settings)
    d = np.asarray(ops.hypergradient_preconditioner(k, beta, **settings)[0])
    assert np.min(d[:, -1]) > 0  # d_0 = 0 in "paper": there, the decay of the second token resets the state
    root = np.sqrt(d)
    with np.errstate(divide="ignore"):
        log_decay = np.diff(np.log(d), axis=1, prepend=np.log(d[:, 1:2] if preset == "paper" else d[:, :1])) / -2
    log_decay[:, 0] = 0.0
    o_kda, state_kda = ops.kda(root * q, root * k, v, beta=beta, log_decay=jnp.asarray(log_decay))
    close(o, o_kda)
    close(state.recurrent[:, 0], root[:, -1, 0, :, None] * np.asarray(state_kda.recurrent[:, 0]))


def test_changing_d_without_the_decay_is_another_rule(x):
    """The decay of the statement above is not optional."""
    q, k, v, beta = heads(x["q"], x["k"], x["v"], x["beta"])
    o, _ = ops.osdn(q, k, v, beta=beta)
    root = jnp.sqrt(ops.hypergradient_preconditioner(k, **ops.hypergradient_preset("paper"))[0])
    o_wrong, _ = ops.delta_net(root * q, root * k, v, beta=beta)
    assert np.linalg.norm(o - o_wrong) > 0.01 * np.linalg.norm(o)
