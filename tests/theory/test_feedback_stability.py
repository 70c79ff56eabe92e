"""Largest stable step size of the feedback, η < 2 / (b² max|u|²): docs/theory.md, "What the feedback guarantees"."""

import numpy as np
import pytest

from osdn_jax import ops
from support.theory import heads, one_hot_keys, unit, unit_keys

pytestmark = pytest.mark.usefixtures("float64")


def distances(k, b=1.0, **options):
    """Return d - 1/b before each token, [T, K], of one sequence of keys [T, K]."""
    keys, strength = heads(k[None], np.full((1, len(k)), b))
    d, _ = ops.hypergradient_preconditioner(keys, None if b == 1 else strength, **options)
    return np.asarray(d[0, :, 0]) - 1 / b


def test_one_hot_keys():
    """One visit of a channel multiplies d_i − 1 by 1 − η: 1.9 converges, 2 oscillates for ever, 2.1 diverges."""
    rounds, size = 120, 8
    k = np.tile(np.eye(size), (rounds, 1))
    for eta in (1.9, 2.0, 2.1):
        distance = distances(k, eta=eta, initial=0.5)[::size]
        expected = -0.5 * (1 - eta) ** np.arange(rounds)
        np.testing.assert_allclose(distance, np.repeat(expected[:, None], size, axis=1), rtol=1e-9)
    assert np.all(np.abs(distances(k, eta=1.9, initial=0.5)[-1]) < 1e-5)
    assert set(distances(k, eta=2.0, initial=0.5)[:, 0]) == {-0.5, 0.5}
    assert np.all(np.abs(distances(k, eta=2.1, initial=0.5)[-1]) > 1e4)


@pytest.mark.parametrize("b", [1.0, 0.5])
def test_a_repeated_key_has_the_limit_of_its_own_length(b):
    """⟨d − 1/b, u⟩ is multiplied by 1 − η b² |u|² at each token, whatever the direction of the key."""
    rng = np.random.default_rng(0)
    for size in (2, 16, 64):
        key = unit(rng.normal(size=size))
        limit = 2 / (b**2 * np.sum(key**4))
        for relative in (0.3, 0.95, 1.0, 1.05):
            d = distances(np.tile(key, (100, 1)), b, eta=relative * limit, initial=0.0)
            along = d @ key**2
            np.testing.assert_allclose(along, -((1 - 2 * relative) ** np.arange(100)) / b, rtol=1e-6, atol=1e-9)


def test_below_the_limit_d_never_moves_away():
    """|d − 1/b| does not increase for any unit keys; above the limit it does."""
    rng = np.random.default_rng(1)
    for size, condition in ((8, 1.0), (32, 100.0)):
        k = unit_keys(rng, (500, size), condition=condition)
        limit = 2 / np.max(np.sum(k**4, axis=-1))
        length = np.linalg.norm(distances(k, eta=0.999 * limit, initial=0.0), axis=-1)
        assert np.all(np.diff(length) <= 1e-12)
    worst = k[np.argmax(np.sum(k**4, axis=-1))]
    length = np.linalg.norm(distances(np.tile(worst, (100, 1)), eta=1.1 * limit, initial=0.0), axis=-1)
    assert length[-1] > 10 * length[0]


@pytest.mark.parametrize("eta", [0.003, 1.9, 2.1, 10.0, 40.0])
def test_bounds_hold_at_any_step_size(eta):
    """Within (2/3, 3/2) a write leaves between −1/2 and 1/3 of the residual, and these states stay bounded."""
    rng = np.random.default_rng(2)
    size, tokens = 16, 1000
    for k in (one_hot_keys(rng, (1, tokens, size)), unit_keys(rng, (1, tokens, size), condition=100.0)):
        settings = ops.hypergradient_preset("trust") | {"eta": eta, "initial": 0.7}
        keys, values, beta = heads(k, k @ rng.normal(size=(size, size)), np.ones((1, tokens)))
        d, _ = ops.hypergradient_preconditioner(keys, **settings)
        factors = 1 - np.sum(np.asarray(d * keys**2), axis=-1)
        assert np.min(factors) >= -0.5 - 1e-12
        assert np.max(factors) <= 1 / 3 + 1e-12
        _, state = ops.osdn(keys, keys, values, beta=beta, **settings)
        assert np.linalg.norm(state.recurrent) < 50
