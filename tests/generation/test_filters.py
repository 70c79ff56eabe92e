"""Draws of tokens: the filters and their order, against NumPy, and the frequencies that they leave."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osdn_jax.generation.filters import Settings, allowed_logits, draw, filtered, most_likely
from support import jit

VOCABULARY = 12


def settings_of(rows, **values):
    """Return the settings of rows; those not given filter nothing."""
    neutral = {
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "repetition_penalty": np.ones(rows, np.float32),
        "seed": np.stack([np.zeros(rows), np.arange(rows)], axis=1).astype(np.uint32),
        "max_tokens": np.full(rows, 9, np.int32),
        "forbidden": np.zeros((rows, VOCABULARY), bool),
        "stop": np.zeros((rows, VOCABULARY), bool),
    }
    given = {
        name: np.broadcast_to(np.asarray(x, neutral[name].dtype), neutral[name].shape) for name, x in values.items()
    }
    return Settings(**{name: jnp.asarray(x) for name, x in (neutral | given).items()})


def reference(logits, seen, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, forbidden=()):
    """Return the probabilities that one row draws from, in float64 and in the order of Transformers."""
    x = np.asarray(logits, np.float64).copy()
    for token in np.flatnonzero(seen):
        x[token] = x[token] / repetition_penalty if x[token] > 0 else x[token] * repetition_penalty
    x[list(forbidden)] = -np.inf
    x = x / temperature
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if top_k:
        x[order[top_k:]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if top_p < 1:
        count = next((n for n in range(1, len(order) + 1) if p[order[:n]].sum() >= top_p), len(order))
        p[order[count:]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


LEVELS = st.sampled_from([-3.0, -1.5, -0.5, 0.0, 0.25, 1.0, 1.75, 2.5])  # ties are frequent


@st.composite
def rows(draw_one):
    return {
        "logits": draw_one(st.lists(LEVELS, min_size=VOCABULARY, max_size=VOCABULARY)),
        "seen": draw_one(st.lists(st.booleans(), min_size=VOCABULARY, max_size=VOCABULARY)),
        "temperature": draw_one(st.sampled_from([0.3, 1.0, 2.0])),
        "top_k": draw_one(st.integers(0, VOCABULARY + 2)),
        "top_p": draw_one(st.sampled_from([0.123, 0.4567, 0.789, 0.951, 1.0])),
        "min_p": draw_one(st.sampled_from([0.0, 0.0511, 0.313])),
        "repetition_penalty": draw_one(st.sampled_from([0.7, 1.0, 1.3])),
        "forbidden": draw_one(st.lists(st.integers(0, VOCABULARY - 1), max_size=3)),
    }


@given(st.lists(rows(), min_size=4, max_size=4))
@settings(max_examples=60)
def test_the_filters_are_those_of_the_reference(cases):
    logits, seen = (np.asarray([case.pop(name) for case in cases]) for name in ("logits", "seen"))
    masks = np.zeros((4, VOCABULARY), bool)
    for row, case in enumerate(cases):
        masks[row, case["forbidden"]] = True
    values = {name: [case[name] for case in cases] for name in cases[0]} | {"forbidden": masks}
    got = compiled(jnp.asarray(logits, jnp.float32), jnp.asarray(seen), settings_of(4, **values))
    for row, case in enumerate(cases):
        want = reference(np.float32(logits[row]), seen[row], **case)
        np.testing.assert_allclose(got[row], want, atol=2e-6)


@functools.cache
def _compiled():
    return jit(lambda x, seen, options: jax.nn.softmax(filtered(allowed_logits(x, seen, options), options), axis=-1))


def compiled(*arguments):
    return np.asarray(_compiled()(*arguments))


def test_each_filter_sees_what_those_before_it_leave():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.15, 0.1, 0.05, *[1e-9] * 7]], jnp.float32))
    none = jnp.zeros((1, VOCABULARY), bool)
    kept = lambda seen=none, **options: set(np.flatnonzero(compiled(logits, seen, settings_of(1, **options))[0] > 1e-6))
    assert kept(top_p=0.6) == {0, 1}
    assert kept(top_p=0.6, top_k=2) == {0, 1}
    assert kept(top_p=0.55, top_k=2) == {0}  # of the two that top_k leaves, the first has 4/7
    assert kept(top_p=0.6, temperature=0.3) == {0}  # the temperature comes first
    assert kept(top_k=1, forbidden=np.arange(VOCABULARY) == 0) == {1}
    assert kept(min_p=0.36) == {0, 1, 2}
    assert kept(min_p=0.36, temperature=3.0) >= {0, 1, 2, 3, 4}
    seen = none.at[0, 0].set(True)
    assert kept(seen, top_k=1, repetition_penalty=2.0) == {1}
    assert kept(seen, top_k=1) == {0}


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_most_likely_tokens_of_many(size):
    rng = np.random.default_rng(size)
    below = np.round(rng.normal(size=(3, size)) * 2, 1).astype(np.float32)
    below -= below.max(axis=-1, keepdims=True)
    order = np.argsort(-below, axis=-1, kind="stable")
    for top_k in {1, 2, size // 3, size} - {0}:
        keep = np.asarray(most_likely(jnp.asarray(below), jnp.full(3, top_k, jnp.int32), jnp.ones(3)))
        for row in range(3):
            assert set(np.flatnonzero(keep[row])) == set(order[row, :top_k])


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8, "temperature": 1.5},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_frequencies_are_those_probabilities(name):
    """Chi-square of 4,000 draws with other seeds, and with one seed at other places; the 99.9 % quantile is exceeded
    by one in a thousand seeds, and these are fixed."""
    rng = np.random.default_rng(7)
    logits, seen = rng.normal(size=VOCABULARY).astype(np.float32) * 1.5, rng.random(VOCABULARY) < 0.4
    want = reference(logits, seen, **OPTIONS[name])
    many = 4000
    options = settings_of(many, **OPTIONS[name])
    repeated = lambda x: jnp.broadcast_to(jnp.asarray(x), (many, VOCABULARY))
    by_seed = np.asarray(jit(draw)(repeated(logits), repeated(seen), options, jnp.int32(3)))
    one = settings_of(1, **OPTIONS[name])
    places = jnp.arange(many, dtype=jnp.int32)
    at = jit(jax.vmap(lambda place: draw(jnp.asarray(logits)[None], jnp.asarray(seen)[None], one, place)[0]))
    for drawn in (by_seed, np.asarray(at(places))):
        counts = np.bincount(drawn, minlength=VOCABULARY)
        assert counts[want == 0].sum() == 0
        likely = want > 0
        square = np.sum((counts[likely] - many * want[likely]) ** 2 / (many * want[likely]))
        assert square < QUANTILE[int(likely.sum()) - 1]


# 99.9 % quantiles of chi-square with 1 to 11 degrees of freedom.
QUANTILE = dict(enumerate([10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26], 1)) | {0: 1e-9}


def test_a_row_draws_what_it_draws_alone():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(5, VOCABULARY)).astype(np.float32)
    options = settings_of(
        5, temperature=[0.0, 0.5, 1.0, 2.0, 1.0], top_k=[0, 3, 0, 5, 1], seed=rng.integers(2**31, size=(5, 2))
    )
    none = jnp.zeros((5, VOCABULARY), bool)
    together = np.asarray(draw(jnp.asarray(logits), none, options, jnp.int32(8)))
    for row in range(5):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], options)
        assert draw(jnp.asarray(logits[row : row + 1]), none[:1], alone, jnp.int32(8))[0] == together[row]
    assert together[0] == logits[0].argmax()


@pytest.mark.parametrize("damage", [np.nan, -np.inf])
def test_logits_without_a_token_give_minus_1_in_their_row_alone(damage):
    logits = jnp.asarray(np.stack([np.full(VOCABULARY, damage), np.arange(VOCABULARY)]), jnp.float32)
    none = jnp.zeros((2, VOCABULARY), bool)
    for temperature in (0.0, 1.0):
        drawn = np.asarray(draw(logits, none, settings_of(2, temperature=temperature, top_k=1), jnp.int32(0)))
        assert drawn.tolist() == [-1, VOCABULARY - 1]


def test_seeds_of_64_bits_have_keys_of_their_own():
    seeds = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32 - 1, 2**32 - 1)]
    options = settings_of(len(seeds), seed=np.asarray(seeds, np.uint32))
    none = jnp.zeros((len(seeds), VOCABULARY), bool)
    rows = [tuple(np.asarray(draw(jnp.zeros(none.shape), none, options, jnp.int32(i)))) for i in range(20)]
    assert len(set(zip(*rows, strict=True))) == len(seeds)
    assert all(len(set(pair)) > 1 for pair in itertools.pairwise(rows))
