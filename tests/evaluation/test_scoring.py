"""Scores of tokens in batches: those of each sequence alone, whatever it is padded to or cut into."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax.evaluation.scoring import TokenScorer, batches, padded_length, token_scores
from support.text import byte_model, continued, log_likelihoods

RULES = ("osdn", "transformer")


def pairs_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(256, size=a).tolist(), rng.integers(256, size=b).tolist()) for a, b in lengths]


def direct(pair, rule):
    tokens = [*pair[0], *pair[1]]
    values, greedy = log_likelihoods(tokens, rule)
    return values[len(pair[0]) - 1 :].sum(dtype=np.float64), bool(greedy[len(pair[0]) - 1 :].all())


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_each_sequence_alone(rule):
    pairs = pairs_of([(3, 4), (1, 16), (12, 1), (5, 12), (2, 2)])
    # Continuations that the model itself would choose: greedy, and not greedy after the first token is changed.
    likely = [0, *np.random.default_rng(1).integers(256, size=6).tolist()]
    likely += continued(likely, 3, rule)
    pairs += [(likely[:7], likely[7:]), (likely[:7], [(likely[7] + 1) % 256, *likely[8:]])]
    done = []
    scores = TokenScorer(*byte_model(rule), batch_size=2).score(pairs, done.append)
    for pair, score in zip(pairs, scores, strict=True):
        value, greedy = direct(pair, rule)
        assert score.log_likelihood == pytest.approx(value, rel=1e-5, abs=1e-4)
        assert score.greedy == greedy
    assert [score.greedy for score in scores[-2:]] == [True, False]
    assert sum(done) == len(pairs)


@pytest.mark.parametrize("rule", ["osdn", "os_kda"])
def test_a_carried_state_equals_one_call(rule):
    pairs = pairs_of([(1, 100), (70, 3), (20, 20)])
    scores = TokenScorer(*byte_model(rule), batch_size=2, piece=16).score(pairs)
    for pair, score in zip(pairs, scores, strict=True):
        assert score.log_likelihood == pytest.approx(direct(pair, rule)[0], rel=1e-5, abs=1e-4)


def test_attention_carries_its_cache():
    """With a cache as long as the text, pieces see everything before them."""
    pairs = pairs_of([(1, 60), (40, 9)])
    scores = TokenScorer(*byte_model("transformer", max_length=64), batch_size=2, piece=16).score(pairs)
    for pair, score in zip(pairs, scores, strict=True):
        assert score.log_likelihood == pytest.approx(direct(pair, "transformer")[0], rel=1e-5, abs=1e-4)


def test_nothing_to_score_is_certain():
    scores = TokenScorer(*byte_model()).score([([1, 2], [])])
    assert scores == [(0.0, True)]
    assert TokenScorer(*byte_model()).score([]) == []


def test_logits_in_parts_are_the_same(monkeypatch):
    apply, parameters = byte_model()
    tokens = jnp.asarray(np.random.default_rng(2).integers(256, size=(2, 19)), jnp.int32)
    whole, _ = jax.jit(partial(token_scores, apply))(parameters, tokens[:, :-1], tokens[:, 1:])
    monkeypatch.setattr("osdn_jax.evaluation.scoring._LOGITS", 2 * 260 * 5)
    parts, _ = jax.jit(partial(token_scores, apply))(parameters, tokens[:, :-1], tokens[:, 1:])
    np.testing.assert_allclose(parts.log_likelihoods, whole.log_likelihoods, rtol=1e-6)
    np.testing.assert_array_equal(parts.greedy, whole.greedy)


def test_few_shapes():
    lengths = dict(enumerate(np.random.default_rng(0).integers(1, 5000, size=500).tolist()))
    found = list(batches(lengths, 8, 1024))
    assert sorted(i for members, _ in found for i in members) == list(range(500))
    assert all(len(members) <= rows for members, (rows, _) in found)
    assert all(lengths[i] <= length for members, (_, length) in found for i in members)
    # Programs see pieces: powers of two up to 1,024, and each length with one number of rows.
    shapes = {(rows, min(length, 1024)) for _, (rows, length) in found}
    assert len(shapes) <= 2 * 7
    assert padded_length(1025, 1024) == 2048


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size: got 0, expected at least 1"), ({"piece": 24}, "piece: got 24, expected a power")],
)
def test_wrong_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TokenScorer(*byte_model(), **options)


def test_an_empty_context_is_named():
    with pytest.raises(ValueError, match="pairs: got an empty context in pair 1"):
        TokenScorer(*byte_model()).score([([1], [2]), ([], [2])])
