"""The tasks of MAD against their definitions: every target follows from the tokens, by an oracle that only reads."""

import numpy as np
import pytest

from osdn_jax.data.recall import (
    IGNORE,
    TASKS,
    compression,
    fuzzy_in_context_recall,
    in_context_recall,
    memorization,
    memorized_map,
    noisy_in_context_recall,
    selective_copying,
)

RECALL = [
    (in_context_recall, {"vocabulary": 16}),
    (in_context_recall, {"length": 4, "vocabulary": 3}),
    (noisy_in_context_recall, {"vocabulary": 32, "noise_vocabulary": 16, "noise": 0.2}),
    (noisy_in_context_recall, {"length": 20, "vocabulary": 10, "noise_vocabulary": 2, "noise": 1.0}),
]


@pytest.mark.parametrize(("task", "options"), RECALL)
def test_in_context_recall(task, options):
    tokens, targets = task(2000, seed=1, **options)
    size = options["vocabulary"] - options.get("noise_vocabulary", 0)
    assert tokens.shape == targets.shape == (2000, options.get("length", 128))
    for row, target in zip(tokens, targets, strict=True):
        memory, questions = {}, []
        for i in range(0, len(row), 2):
            key, value = row[i : i + 2]
            if key >= size:
                assert size <= value < options["vocabulary"]
                assert (target[i : i + 2] == IGNORE).all()
                continue
            assert key < size // 2 <= value < size
            if key in memory:
                questions.append(i)
                assert target[i] == memory[key] == value
            memory[key] = value
        assert np.flatnonzero(target != IGNORE).tolist() == questions
        assert questions[-1] == len(row) - 2


def test_the_share_of_noise():
    tokens, _ = noisy_in_context_recall(4000, 64, noise=0.3, seed=0)
    share = (tokens[:, :-2:2] >= 16).mean()
    assert abs(share - 0.3 * 30 / 31) < 0.005  # one of 31 pairs is never noise


def test_keys_and_values_are_uniform():
    tokens, _ = in_context_recall(20_000, 8, vocabulary=8, seed=0)
    for column, low in ((0, 0), (1, 4), (2, 0), (7, 4)):
        counts = np.bincount(tokens[:, column], minlength=8)[low : low + 4]
        assert counts.sum() == len(tokens)
        assert (np.abs(counts / len(tokens) - 0.25) < 0.015).all()


def motifs(row, first_value, padding):
    """Read [(key, value, position of the value)] of a row that starts with padding."""
    found, i = [], 0
    while row[i] == padding:
        i += 1
    while i < len(row):
        middle = i
        while row[middle] < first_value:
            middle += 1
        end = middle
        while end < len(row) and row[end] >= first_value:
            end += 1
        found.append((tuple(row[i:middle]), tuple(row[middle:end]), middle))
        i = end
    return found


FUZZY = [
    {},
    {"varied_keys": False},
    {"length": 256, "vocabulary": 32},
    {"length": 13, "vocabulary": 7},
    {"length": 40, "vocabulary": 8, "key_size": 1, "value_size": 4},
    {"length": 60, "vocabulary": 60, "key_size": 13, "value_size": 13},  # keys too long for a number of 64 bits
]


@pytest.mark.parametrize("options", FUZZY, ids=str)
def test_fuzzy_in_context_recall(options):
    tokens, targets = fuzzy_in_context_recall(1500, seed=3, **options)
    same, shifted = fuzzy_in_context_recall(1500, seed=3, all_tokens=True, **options)
    np.testing.assert_array_equal(same, tokens)
    np.testing.assert_array_equal(shifted[:, :-1], tokens[:, 1:])
    vocabulary, key_size = options.get("vocabulary", 16), options.get("key_size", 3)
    first_value, padding = (vocabulary - 1) // 2, vocabulary - 1
    assert tokens.shape == (1500, options.get("length", 128))
    sizes = []
    for row, target, last in zip(tokens.tolist(), targets.tolist(), shifted[:, -1].tolist(), strict=True):
        row.append(last)
        assert max(len(row) - 1 - row[::-1].index(padding), 0) == row.count(padding) - 1  # only at the start
        memory, questions = {}, {}
        found = motifs(row, first_value, padding)
        for key, value, at in found:
            assert len(set(key)) == len(key) <= key_size
            assert len(set(value)) == len(value) <= options.get("value_size", 3)
            if options.get("varied_keys") is False:
                assert len(key) == key_size
            if key in memory:
                assert memory[key] == value
                questions |= {at + i - 1: token for i, token in enumerate(value)}
            memory[key] = value
        assert {i: token for i, token in enumerate(target) if token != IGNORE} == questions
        assert found[-1][0] in {key for key, _, _ in found[:-1]}
        sizes += [len(key) for key, _, _ in found[:1]]
    if options.get("varied_keys", True) and key_size == 3:
        np.testing.assert_allclose(np.bincount(sizes)[1:] / len(sizes), 1 / 3, atol=0.06)


def test_fuzzy_motifs_are_uniform():
    tokens, _ = fuzzy_in_context_recall(20_000, 13, vocabulary=8, key_size=2, value_size=1, varied_keys=False, seed=0)
    end = np.concatenate([tokens[:, -2:]], axis=1)  # the key of the probe
    counts = np.bincount(end[:, 0] * 3 + end[:, 1], minlength=9).reshape(3, 3)
    assert counts.trace() == 0
    assert (np.abs(counts[~np.eye(3, dtype=bool)] / len(tokens) - 1 / 6) < 0.015).all()


def test_blocks_of_fuzzy_recall_are_joined():
    tokens, targets = fuzzy_in_context_recall(8200, 20, seed=0)
    assert tokens.shape == targets.shape == (8200, 20)
    assert (targets != IGNORE).any(axis=1).all()


@pytest.mark.parametrize("options", [{}, {"length": 34}, {"length": 4, "copies": 1, "vocabulary": 3}])
def test_selective_copying(options):
    vocabulary, copies = options.get("vocabulary", 16), options.get("copies", 16)
    tokens, targets = selective_copying(2000, seed=1, **options)
    for row, target in zip(tokens, targets, strict=True):
        before = row[: -copies - 1]
        content = before[before < vocabulary - 2]
        assert row[-copies - 1] == vocabulary - 1
        assert np.count_nonzero(row == vocabulary - 1) == 1
        assert (row[-copies:] == vocabulary - 2).all()
        np.testing.assert_array_equal(target[-copies:], content)
        assert (target[:-copies] == IGNORE).all()
        assert before[-1] != vocabulary - 2  # no blank after the last token


def test_blanks_of_selective_copying_are_uniform():
    tokens, _ = selective_copying(8000, 20, copies=4, vocabulary=8, seed=0)
    before = tokens[:, :15]
    gaps = [np.diff(np.flatnonzero(row < 6), prepend=-1) - 1 for row in before]
    np.testing.assert_allclose(np.mean(gaps, axis=0), 11 / 4, atol=0.06)
    assert abs(np.var([gap[0] for gap in gaps]) - 11 * 0.25 * 0.75) < 0.1  # binomial


def test_memorization():
    tokens, targets = memorization(2000, 32, vocabulary=33, seed=4)
    table = memorized_map(33)
    assert sorted(set(table)) == sorted(table)
    assert set(table) <= set(range(16, 32))
    np.testing.assert_array_equal(tokens[:, 1::2], 32)
    assert set(np.unique(tokens[:, ::2])) == set(range(16))
    np.testing.assert_array_equal(targets[:, 1::2], table[tokens[:, ::2]])
    assert (targets[:, ::2] == IGNORE).all()
    assert (memorized_map(33, map_seed=1) != table).any()
    held_out = memorization(100, 32, vocabulary=33, seed=5)
    np.testing.assert_array_equal(held_out.targets[:, 1::2], table[held_out.tokens[:, ::2]])


@pytest.mark.parametrize("length", [31, 32])
def test_compression(length):
    tokens, targets = compression(2000, length, seed=0)
    np.testing.assert_array_equal(targets[:, 16:31], tokens[:, :15])
    assert (tokens[:, 15:] == 15).all()
    assert (targets[:, :16] == IGNORE).all()
    assert (targets[:, 31:] == IGNORE).all()
    assert tokens[:, :15].max() == 14
    inputs, outputs = compression(100, length, autoencoder=True, seed=0)
    np.testing.assert_array_equal(inputs, outputs)
    assert (inputs[:, -1] == 15).all()
    assert (inputs[:, :-1] < 15).all()


OPTIONS = {
    "mqar": {"length": 64, "pairs": 8},
    "forgetting_mqar": {"length": 64, "pairs": 8, "updates": 4},
    "drifting_mqar": {"length": 64, "pairs": 8},
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_types_and_seed(name):
    task, options = TASKS[name], OPTIONS.get(name, {})
    one, same, other = (task(60, seed=seed, **options) for seed in (1, 1, (1, 2)))
    for array in one:
        assert array.dtype == np.int32
        assert array.flags.c_contiguous
        assert len(array) == 60
    assert one.tokens.shape == one.targets.shape
    np.testing.assert_array_equal(one.tokens, same.tokens)
    np.testing.assert_array_equal(one.targets, same.targets)
    assert (one.tokens != other.tokens).any(axis=1).mean() > 0.9
    assert (one.targets != IGNORE).any(axis=1).all()


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"memorization"}))
def test_a_random_guesser_is_at_chance(name):
    """Guesses are uniform over the answers that occur; nothing but the context tells them apart."""
    _, targets = TASKS[name](3000, seed=0, vocabulary=36, **OPTIONS.get(name, {}))
    asked = targets[targets != IGNORE]
    answers = np.unique(asked)
    guesses = np.random.default_rng(1).choice(answers, len(asked))
    chance = 1 / len(answers)
    assert abs((guesses == asked).mean() - chance) < 5 * np.sqrt(chance / len(asked))
    assert np.bincount(asked).max() / len(asked) < 1.25 * chance  # no answer is much more frequent than others


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (in_context_recall, {"length": 7}, "length: got 7, expected an even number"),
        (in_context_recall, {"vocabulary": 1}, "vocabulary: got 1, expected at least 2"),
        (
            noisy_in_context_recall,
            {"vocabulary": 17},
            "vocabulary: got 17, expected at least noise_vocabulary . 2 = 18",
        ),
        (noisy_in_context_recall, {"noise": 1.5}, "noise: got 1.5, expected a finite number from 0 to 1"),
        (noisy_in_context_recall, {"noise_vocabulary": 0}, "noise_vocabulary: got 0, expected at least 1"),
        (fuzzy_in_context_recall, {"length": 12}, r"length: got 12, expected at least 2 \* .* = 13"),
        (fuzzy_in_context_recall, {"vocabulary": 6}, "vocabulary: got 6, expected at least 7"),
        (selective_copying, {"length": 33}, r"length: got 33, expected at least 2 \* copies . 2 = 34"),
        (selective_copying, {"vocabulary": 2}, "vocabulary: got 2, expected at least 3"),
        (memorization, {"length": 31}, "length: got 31, expected an even number"),
        (memorization, {"map_seed": -1}, "map_seed: got -1, expected at least 0"),
        (compression, {"length": 2}, "length: got 2, expected at least 3"),
    ],
)
def test_mistakes_end_in_one_line(task, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        task(4, seed=0, **arguments)
