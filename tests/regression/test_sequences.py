"""The sequences of the bench: norms, covariances, spectra, drift and pairs are as the condition says."""

import dataclasses

import numpy as np
import pytest

from osdn_jax.regression import FAMILIES, Condition, draw, standard_conditions
from osdn_jax.regression.sequences import spectrum, unit_second_moment

LONG = {"width": 4, "length": 60_000}


def covariance(k):
    return np.einsum("ti,tj->ij", k, k) / len(k)


def test_unit_keys_have_norm_1_and_the_stated_second_moments():
    drawn = draw(Condition("x", 100, **LONG), 1)
    np.testing.assert_allclose(np.linalg.norm(drawn.k, axis=-1), 1, rtol=1e-12)
    np.testing.assert_allclose(drawn.second_moment.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(covariance(drawn.k[0]), np.diag(drawn.second_moment[0, 0]), atol=0.006)
    assert np.all(np.diff(drawn.second_moment[0, 0]) < 0)


@pytest.mark.parametrize("kappa", [1, 100, 1000])
def test_second_moments_of_unit_keys_against_samples(kappa):
    x = np.random.default_rng(5).standard_normal((200_000, 3)) * np.sqrt(spectrum(3, kappa))
    expected = np.mean(np.square(x / np.linalg.norm(x, axis=-1, keepdims=True)), axis=0)
    np.testing.assert_allclose(unit_second_moment(3, kappa), expected, rtol=0.02)
    np.testing.assert_allclose(unit_second_moment(32, kappa).sum(), 1, rtol=1e-12)


def test_keys_without_a_norm_have_the_stated_covariance():
    """Eigenvalues fall geometrically over the condition number, and their sum is the scale."""
    k = draw(Condition("x", 1000, scale=(4.0, 4.0), **LONG), 1).k[0]
    expected = 4 * spectrum(4, 1000) / spectrum(4, 1000).sum()
    np.testing.assert_allclose(np.diag(covariance(k)), expected, rtol=0.03)
    np.testing.assert_allclose(expected[0] / expected[-1], 1000)
    correlation = np.corrcoef(k.T)
    assert np.abs(correlation - np.eye(4)).max() < 0.02


def test_rotated_keys_have_the_same_spectrum_and_other_axes():
    plain, rotated = (draw(Condition("x", 100, rotated=r, **LONG), 1) for r in (False, True))
    both = [np.linalg.eigvalsh(covariance(drawn.k[0])) for drawn in (plain, rotated)]
    np.testing.assert_allclose(*both, rtol=1e-9)
    np.testing.assert_allclose(np.diag(covariance(rotated.k[0])), rotated.second_moment[0, 0], rtol=0.03)
    assert np.abs(covariance(rotated.k[0]) - np.diag(np.diag(covariance(rotated.k[0])))).max() > 0.05


def test_the_spectrum_is_reversed_half_way():
    drawn = draw(Condition("x", 100, drift="keys", **LONG), 1)
    early, late = (np.diag(covariance(half)) for half in np.split(drawn.k[0], 2))
    np.testing.assert_allclose(early, late[::-1], rtol=0.05)
    np.testing.assert_allclose(drawn.second_moment[0, -1], drawn.second_moment[0, 0][::-1])
    np.testing.assert_allclose(np.diag(covariance(drawn.asked[0])), drawn.second_moment[0, -1], atol=0.06)


def test_the_map_changes_half_way():
    drawn = draw(Condition("x", drift="map", width=4, length=100), 1)
    first, second = (np.linalg.lstsq(drawn.k[0, half], drawn.v[0, half])[0] for half in (slice(50), slice(50, None)))
    np.testing.assert_allclose(drawn.k[0, :50] @ first, drawn.v[0, :50], atol=1e-9)
    np.testing.assert_allclose(drawn.asked[0] @ second, drawn.answers[0], atol=1e-9)
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(
    ("path", "places"), [("step", (0.1, 0.1, 10.0)), ("ramp", (0.1, 1.0, 10.0)), ("constant", (0.1, 0.1, 0.1))]
)
def test_scales(path, places):
    drawn = draw(Condition("x", scale=(0.1, 10.0), path=path, width=200, length=1001), 1)
    found = drawn.scale[0, [0, 499, -1]]
    np.testing.assert_allclose(found, places, rtol=0.01)
    np.testing.assert_allclose(drawn.second_moment.sum(-1), drawn.scale)
    np.testing.assert_allclose(np.sum(drawn.k**2, -1) / drawn.scale, 1, rtol=0.6)
    np.testing.assert_allclose(np.mean(drawn.k**2 / drawn.scale[..., None]), 1 / 200, rtol=0.02)


def test_random_scales_are_log_uniform():
    logs = np.log10(draw(Condition("x", scale=(0.1, 10.0), path="random", width=4, length=20_000), 1).scale)
    np.testing.assert_allclose(np.quantile(logs, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.03)


def test_noise_is_added_to_the_values_alone():
    clean, noisy = (draw(Condition("x", 10, noise=n, width=32, length=2000), 2) for n in (0.0, 0.3))
    np.testing.assert_array_equal(clean.k, noisy.k)
    np.testing.assert_array_equal(clean.answers, noisy.answers)
    np.testing.assert_allclose(np.mean(np.sum((noisy.v - clean.v) ** 2, -1)), 0.09, rtol=0.03)
    np.testing.assert_allclose(np.mean(np.sum(clean.v**2, -1)), 1, rtol=0.15)


def test_pairs_are_repeated_and_asked():
    drawn = draw(Condition("x", 100, width=8, pairs=5, reads=4), 2)
    assert drawn.k.shape == drawn.v.shape == (2, 20, 8)
    for repeated, once in ((drawn.k, drawn.asked), (drawn.v, drawn.answers)):
        np.testing.assert_array_equal(repeated.reshape(2, 4, 5, 8), np.repeat(once[:, None], 4, 1))
    np.testing.assert_allclose(np.linalg.norm(drawn.answers, axis=-1), 1)


def test_a_seed_does_not_depend_on_the_others():
    condition = Condition("x", 10, rotated=True, noise=0.1, width=4, length=10)
    three, one = draw(condition, 3), draw(condition, 1, first_seed=2)
    for several, single in zip(three[:6], one[:6], strict=True):
        np.testing.assert_array_equal(several[2:], single)
    assert not np.array_equal(three.k[0], three.k[1])


def test_the_standard_conditions():
    found = standard_conditions()
    assert len(set(found)) == len(found)
    assert len({(c.family, c.name) for c in found}) == len(found)
    assert {c.family for c in found} == FAMILIES.keys()
    stationary = [c for c in found if c.family in ("stationary", "noisy")]
    assert {c.condition_number for c in stationary} == {1, 10, 100, 1000}
    assert {(c.width, c.length) for c in stationary} == {(32, 1000)}
    repeated = [c for c in found if c.pairs]
    assert {(c.pairs, c.reads) for c in repeated} == {(p, r) for p in (32, 64, 128, 256) for r in (1, 2, 4)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("condition_number", 0.5),
        ("noise", -1.0),
        ("width", 1),
        ("length", 2.5),
        ("pairs", -1),
        ("reads", 0),
        ("scale", (0.0, 1.0)),
        ("scale", 2.0),
        ("path", "spiral"),
        ("drift", "slow"),
    ],
)
def test_wrong_conditions(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got .*expected"):
        dataclasses.replace(Condition("x"), **{field: value})


def test_wrong_combinations():
    with pytest.raises(ValueError, match="^pairs: got"):
        Condition("x", pairs=3, noise=0.1)
    with pytest.raises(ValueError, match="^families: got 'none', expected some of stationary"):
        standard_conditions(["none"])
    with pytest.raises(ValueError, match="^seeds: got 0"):
        draw(Condition("x"), 0)
