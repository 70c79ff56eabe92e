"""The bound on the squared factors of all writes: docs/theory.md, "What the feedback guarantees"."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support.theory import heads, one_hot_keys, unit_keys

pytestmark = pytest.mark.usefixtures("float64")

TOKENS = 600
KEYS = {
    "isotropic": lambda rng, size: unit_keys(rng, (2, TOKENS, size)),
    "condition 100": lambda rng, size: unit_keys(rng, (2, TOKENS, size), condition=100.0),
    "one-hot": lambda rng, size: one_hot_keys(rng, (2, TOKENS, size)),
}


def run(k, b, **options):
    """Return (factors 1 - b <d, u> [B, T], d before each token [B, T, K], d after the last [B, K])."""
    keys, strength = heads(k, np.full(k.shape[:2], b))
    d, final = ops.hypergradient_preconditioner(keys, None if b == 1 else strength, **options)
    d = np.asarray(d[:, :, 0])
    return 1 - b * np.sum(d * k**2, axis=-1), d, np.asarray(final[:, 0])


def largest_step(k):
    return np.max(np.sum(k**4, axis=-1))


def check(factors, constant):
    """The sum is bounded, and so is the product of the residual ratios q = factor^2: prod q <= (C / T)^T."""
    total = np.sum(factors**2, axis=-1)
    assert np.all(total <= constant * (1 + 1e-9))
    tokens = factors.shape[-1]
    with np.errstate(divide="ignore"):
        assert np.all(np.sum(np.log(factors**2), axis=-1) <= tokens * np.log(total / tokens) + 1e-6)


@pytest.mark.parametrize("keys", KEYS)
def test_sum_of_squared_factors(keys):
    """Σ (1 − b⟨d,u⟩)² ≤ |d_0 − 1/b|² / (η (2 − η b² max|u|²)) for unit keys and a constant b, without projection."""
    for size, eta, b, start in itertools.product((8, 64), (1.0, 0.1, 0.003), (1.0, 0.5), (0.0, 1.5)):
        k = KEYS[keys](np.random.default_rng(size), size)
        factors, _, _ = run(k, b, eta=eta, initial=start)
        distance = size * (start - 1 / b) ** 2
        check(factors, distance / (eta * (2 - eta * b**2 * largest_step(k))))


def test_the_sum_is_what_the_distance_to_the_solution_loses():
    """The identity behind the bound: Σ η (2 − η b² |u|²) (1 − b⟨d,u⟩)² = |d_0 − 1/b|² − |d_T − 1/b|²."""
    for keys, b in itertools.product(KEYS, (1.0, 0.5)):
        k = KEYS[keys](np.random.default_rng(1), 16)
        factors, d, final = run(k, b, eta=0.7, initial=0.2)
        lost = np.sum((d[:, 0] - 1 / b) ** 2, axis=-1) - np.sum((final - 1 / b) ** 2, axis=-1)
        weights = 0.7 * (2 - 0.7 * b**2 * np.sum(k**4, axis=-1))
        np.testing.assert_allclose(np.sum(weights * factors**2, axis=-1), lost, rtol=1e-10)


def test_equality_for_one_hot_keys():
    """At η = 1 and d_0 = 0 each channel costs one token, its first: the sum is K, which is the bound."""
    for size in (4, 32):
        k = KEYS["one-hot"](np.random.default_rng(size), size)
        factors, _, _ = run(k, 1.0, eta=1.0, initial=0.0)
        np.testing.assert_array_equal(np.sum(factors**2, axis=-1), size)
        assert size == size * (0 - 1) ** 2 / (1.0 * (2 - largest_step(k)))


@pytest.mark.parametrize("preset", ["paper", "trust"])
def test_projection_keeps_the_bound(preset):
    """Both published presets project to bounds around 1/b = 1, which brings d no farther from it."""
    settings = ops.hypergradient_preset(preset)
    rng = np.random.default_rng(2)
    for size in (8, 64):
        k = KEYS["condition 100"](rng, size)
        start = rng.uniform(*np.clip(settings["bounds"], 0, 3), size=size)
        factors, d, _ = run(k, 1.0, **(settings | {"initial": jnp.asarray(start[None]), "eta": 1.2}))
        if preset == "trust":
            assert np.any(d[:, 1:] == 2 / 3)  # the projection takes part
        check(factors, np.sum((start - 1) ** 2) / (1.2 * (2 - 1.2 * largest_step(k))))


def test_forgetting_toward_the_solution_keeps_the_bound():
    """With a factor of forgetting of at least g and the anchor 1/b, 2 becomes 2g."""
    rng = np.random.default_rng(3)
    for size, b in itertools.product((8, 64), (1.0, 0.5)):
        k = KEYS["isotropic"](rng, size)
        forget = rng.uniform(0.9, 1.0, size=k.shape[:2])
        options = {"eta": 0.5, "initial": 0.0, "anchor": 1 / b, "log_forget": heads(np.log(forget))[0]}
        factors, _, _ = run(k, b, **options)
        check(factors, size / b**2 / (0.5 * (2 * np.min(forget) - 0.5 * b**2 * largest_step(k))))


def test_forgetting_toward_zero_breaks_it():
    """Under forgetting toward 0 the factors settle above zero, so their sum grows with the tokens."""
    k = KEYS["isotropic"](np.random.default_rng(4), 16)
    (forget,) = heads(np.full(k.shape[:2], np.log(0.9)))
    factors, _, _ = run(k, 1.0, eta=1.0, initial=1.0, log_forget=forget)
    halves = [np.sum(half**2, axis=-1) for half in np.split(factors, 2, axis=1)]
    assert np.all(halves[1] > 0.5 * halves[0])
    assert np.all(halves[1] > 10)


def test_the_bound_needs_unit_keys():
    """With keys of two lengths no d fits all of them, and the sum exceeds the bound."""
    rng = np.random.default_rng(5)
    k = KEYS["isotropic"](rng, 16) * rng.choice([0.5, 1.0], size=(2, TOKENS, 1))
    factors, _, _ = run(k, 1.0, eta=1.0, initial=0.0)
    assert np.all(np.sum(factors**2, axis=-1) > 2 * 16 / (2 - largest_step(k)))
