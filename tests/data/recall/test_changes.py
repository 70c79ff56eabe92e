"""Multi-query recall with updated values and with drifting keys, against their definitions."""

import numpy as np
import pytest

from osdn_jax.data.recall import IGNORE, drifting_mqar, forgetting_mqar


def read(row, start, pairs):
    part = row[start : start + 2 * pairs].tolist()
    return list(zip(part[::2], part[1::2], strict=True))


@pytest.mark.parametrize(
    ("length", "pairs", "updates", "vocabulary"), [(64, 8, 4, 8192), (24, 4, 4, 10), (16, 4, 0, 64), (6, 1, 1, 4)]
)
def test_the_last_value_counts(length, pairs, updates, vocabulary):
    tokens, targets = forgetting_mqar(2000, length, pairs, updates=updates, vocabulary=vocabulary, seed=1)
    changed = np.zeros(pairs)
    for row, target in zip(tokens, targets, strict=True):
        first, second = read(row, 0, pairs), read(row, 2 * pairs, updates)
        memory = dict(first)
        assert len(memory) == pairs
        assert len({key for key, _ in second}) == updates
        for key, value in second:
            assert memory[key] != value
            memory[key] = value  # an oracle that overwrites
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in memory.items())
        positions = np.flatnonzero(target != IGNORE)
        assert sorted(row[positions]) == sorted(memory)
        assert [memory[key] for key in row[positions]] == target[positions].tolist()
        assert positions.min() >= 2 * (pairs + updates)
        changed += [key in dict(second) for key, _ in first]
    if updates:
        np.testing.assert_allclose(changed / len(tokens), updates / pairs, atol=0.06)


def test_remembering_the_first_value_is_wrong_as_often_as_there_are_updates():
    tokens, targets = forgetting_mqar(1000, 64, 8, updates=2, seed=0)
    wrong = [
        dict(read(row, 0, 8))[row[i]] != target[i]
        for row, target in zip(tokens, targets, strict=True)
        for i in np.flatnonzero(target != IGNORE)
    ]
    assert sum(wrong) == 2 * 1000


@pytest.mark.parametrize(
    ("length", "pairs", "vocabulary", "reads", "drift"),
    [(64, 8, 8192, 1, True), (64, 8, 18, 1, True), (48, 4, 32, 3, True), (64, 8, 18, 2, False), (8, 2, 6, 1, True)],
)
def test_each_half_is_an_mqar_of_its_own_keys(length, pairs, vocabulary, reads, drift):
    tokens, targets = drifting_mqar(1500, length, pairs, vocabulary=vocabulary, reads=reads, drift=drift, seed=2)
    keys_end = vocabulary // 2
    middle = 1 + (keys_end - 1) // 2
    parts = (range(1, middle), range(middle, keys_end)) if drift else (range(1, keys_end),) * 2
    halves = [np.split(array, 2, axis=1) for array in (tokens, targets)]
    for rows in zip(*halves[0], *halves[1], strict=True):
        memories = []
        for row, target, own, other in zip(rows[:2], rows[2:], parts, parts[::-1], strict=True):
            memory = dict(read(row, 0, pairs // 2))
            assert set(memory) <= set(own)
            assert all(keys_end <= value < vocabulary for value in memory.values())
            for i in range(1, reads):
                assert dict(read(row, pairs * i, pairs // 2)) == memory
                assert read(row, pairs * i, pairs // 2) != read(row, pairs * (i - 1), pairs // 2)
            positions = np.flatnonzero(target != IGNORE)
            assert [memory[key] for key in row[positions]] == target[positions].tolist()
            assert sorted(row[positions]) == sorted(memory)
            if drift:
                assert not np.isin(row, list(other)).any()
            memories.append(memory)
        assert len({**memories[0], **memories[1]}) == pairs
        assert len({*memories[0].values(), *memories[1].values()}) == pairs


@pytest.mark.parametrize("drift", [True, False])
def test_gaps_hold_the_rest_of_the_vocabulary(drift):
    tokens, targets = drifting_mqar(4000, 64, 2, vocabulary=18, drift=drift, seed=0)
    rest = tokens[:, 2:32][targets[:, 2:32] == IGNORE]
    counts = np.bincount(rest, minlength=18)
    allowed = np.setdiff1d(np.arange(18), np.arange(5, 9)) if drift else np.arange(18)
    assert counts.sum() == counts[allowed].sum()
    expected = len(rest) / len(allowed)
    assert ((counts[allowed] - expected) ** 2 / expected).sum() < 45


def test_without_random_gaps_they_are_empty():
    for tokens, targets in (
        forgetting_mqar(100, 64, 4, updates=2, random_gaps=False, seed=0),
        drifting_mqar(100, 64, 4, random_gaps=False, seed=0),
    ):
        assert (np.count_nonzero(tokens, axis=1) <= 2 * 4 + 2 * 2 + 4).all()
        assert (tokens[targets != IGNORE] != 0).all()


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (forgetting_mqar, {"updates": 9}, "updates: got 9, expected at most pairs = 8"),
        (forgetting_mqar, {"updates": -1}, "updates: got -1, expected at least 0"),
        (forgetting_mqar, {"length": 38}, "pairs: got 8 with length = 38 and updates = 4, .* = 40"),
        (forgetting_mqar, {"length": 41}, "length: got 41, expected an even number"),
        (forgetting_mqar, {"vocabulary": 17}, "vocabulary: got 17, expected at least 18"),
        (drifting_mqar, {"length": 62}, "length: got 62, expected a multiple of 4"),
        (drifting_mqar, {"pairs": 7}, "pairs: got 7, expected an even number"),
        (drifting_mqar, {"length": 28}, "pairs: got 8 with length = 28 and reads = 1, .* = 32"),
        (drifting_mqar, {"vocabulary": 17}, "vocabulary: got 17, expected at least 18"),
        (drifting_mqar, {"vocabulary": 17, "drift": False}, "vocabulary: got 17, expected at least 18"),
    ],
)
def test_mistakes_end_in_one_line(task, arguments, message):
    given = {"length": 64, "pairs": 8} | ({"updates": 4} if task is forgetting_mqar else {}) | arguments
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        task(4, seed=0, **given)
