"""Multi-query associative recall against its definition."""

import numpy as np
import pytest

from osdn_jax.data.recall import IGNORE, mqar


def asked(targets):
    """The (row, position) of every question."""
    return np.argwhere(targets != IGNORE)


def pairs_of(row, pairs, read=0):
    start = 2 * pairs * read
    part = row[start : start + 2 * pairs].tolist()
    return list(zip(part[::2], part[1::2], strict=True))


CASES = [
    {"length": 64, "pairs": 8},
    {"length": 64, "pairs": 16, "vocabulary": 64},
    {"length": 64, "pairs": 16, "vocabulary": 34, "random_gaps": False},  # every key and all but one value
    {"length": 48, "pairs": 6, "reads": 3, "power": 1.0},
    {"length": 4, "pairs": 1, "vocabulary": 4},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_example_follows_the_definition(case):
    pairs, reads, vocabulary = case["pairs"], case.get("reads", 1), case.get("vocabulary", 8192)
    tokens, targets = mqar(2000, seed=3, **case)
    assert tokens.dtype == targets.dtype == np.int32
    assert tokens.shape == targets.shape == (2000, case["length"])
    assert tokens.min() >= 0
    assert tokens.max() < vocabulary
    for row, target in zip(tokens, targets, strict=True):
        given = dict(pairs_of(row, pairs))
        assert len(given) == len(set(given.values())) == pairs
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in given.items())
        for read in range(1, reads):
            assert dict(pairs_of(row, pairs, read)) == given
            assert pairs_of(row, pairs, read) != pairs_of(row, pairs, read - 1)
        positions = np.flatnonzero(target != IGNORE)
        assert sorted(row[positions]) == sorted(given)  # every key once
        assert [given[key] for key in row[positions]] == target[positions].tolist()
        assert positions.min() >= 2 * pairs * reads
        assert not (positions % 2).any()
        if not case.get("random_gaps", True):
            rest = np.delete(row, positions)[2 * pairs * reads :]
            assert not rest.any()


def test_keys_and_values_are_uniform():
    tokens, _ = mqar(20_000, 16, 3, vocabulary=16, seed=0)
    for column, (low, high) in ((0, (1, 8)), (1, (8, 16)), (4, (1, 8)), (5, (8, 16))):
        counts = np.bincount(tokens[:, column], minlength=16)[low:high]
        expected = len(tokens) / (high - low)
        assert ((counts - expected) ** 2 / expected).sum() < 25  # 6 or 7 degrees of freedom


def chosen_slots(tokens, targets, pairs):
    """The slot of the query of each pair, in the order of the pairs."""
    keys = tokens[:, None, 0 : 2 * pairs : 2]
    at = (tokens[:, :, None] == keys) & (targets != IGNORE)[:, :, None]
    return (at.argmax(axis=1) - 2 * pairs) // 2


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_slots_follow_the_power_law(power):
    """The first and the second draw without replacement against their exact probabilities, by chi-square."""
    tokens, targets = mqar(40_000, 44, 2, power=power, random_gaps=False, seed=5)
    slots = chosen_slots(tokens, targets, 2)
    p = np.arange(1, 21) ** (power - 1)
    p /= p.sum()
    joint = p[:, None] * p[None, :] / (1 - p[:, None])
    np.fill_diagonal(joint, 0)
    for draw, probability in ((0, p), (1, joint.sum(axis=0))):
        expected = len(tokens) * probability
        counts = np.bincount(slots[:, draw], minlength=20)
        assert ((counts - expected) ** 2 / expected).sum() < 45  # 19 degrees of freedom: 1 in 1,000 above 43.8
    assert np.all(slots[:, 0] != slots[:, 1])


def test_half_of_the_first_draws_are_in_the_first_twelve_of_240_slots():
    tokens, targets = mqar(20_000, 512, 16, random_gaps=False, seed=0)
    first = chosen_slots(tokens, targets, 16)[:, 0]
    assert abs(np.mean(first < 12) - 0.5) < 0.02
    assert abs(np.mean(first == 0) - 0.161) < 0.01


def test_gaps_hold_the_whole_vocabulary():
    tokens, targets = mqar(4000, 64, 4, vocabulary=16, seed=0)
    rest = tokens[:, 8:][targets[:, 8:] == IGNORE]
    counts = np.bincount(rest, minlength=16)
    expected = len(rest) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 40  # 15 degrees of freedom


def test_a_random_guesser_is_at_chance():
    _, targets = mqar(5000, 64, 8, vocabulary=64, seed=0)
    guesses = np.random.default_rng(1).integers(32, 64, targets.shape)
    right = (guesses == targets)[targets != IGNORE]
    assert abs(right.mean() - 1 / 32) < 4 * np.sqrt(1 / 32 / len(right))


def test_the_seed_decides():
    once, again, other = (mqar(50, 32, 4, seed=seed) for seed in ((1, 0), (1, 0), (1, 1)))
    np.testing.assert_array_equal(once.tokens, again.tokens)
    np.testing.assert_array_equal(once.targets, again.targets)
    assert (once.tokens != other.tokens).mean() > 0.5
    assert (mqar(50, 32, 4, seed=0).tokens != mqar(50, 32, 4, seed=1).tokens).mean() > 0.5


def test_a_pair_read_often_needs_no_other_order():
    tokens, _ = mqar(100, 16, 1, reads=4, seed=0)
    np.testing.assert_array_equal(tokens[:, :8], np.tile(tokens[:, :2], 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 63}, "length: got 63, expected an even number"),
        ({"length": 30}, "pairs: got 8 with length = 30 and reads = 1, expected a length of at least .* = 32"),
        ({"reads": 4}, "pairs: got 8 with length = 64 and reads = 4, expected a length of at least .* = 80"),
        ({"vocabulary": 17}, "vocabulary: got 17, expected at least 18"),
        ({"vocabulary": 2}, "vocabulary: got 2, expected at least 4"),
        ({"pairs": 0}, "pairs: got 0, expected at least 1"),
        ({"examples": 0}, "examples: got 0, expected at least 1"),
        ({"reads": 0}, "reads: got 0, expected at least 1"),
        ({"power": 0.0}, "power: got 0.0, expected a finite number above 0 to 1"),
        ({"power": float("nan")}, "power: got nan, expected a finite number above 0 to 1"),
        ({"seed": -1}, "seed: got -1, expected at least 0"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        mqar(**({"examples": 4, "length": 64, "pairs": 8, "seed": 0} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 64.0}, "length: got 64.0, expected an integer"),
        ({"pairs": True}, "pairs: got True, expected an integer"),
        ({"power": "1"}, "power: got '1', expected a number"),
        ({"random_gaps": 1}, "random_gaps: got 1, expected True or False"),
        ({"seed": None}, "seed: got None, expected an integer"),
    ],
)
def test_values_of_another_type(arguments, message):
    with pytest.raises(TypeError, match=f"^{message}$"):
        mqar(**({"examples": 4, "length": 64, "pairs": 8, "seed": 0} | arguments))
