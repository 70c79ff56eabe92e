"""Training batches: reproducible, resumable, shared between processes, mixed by weight. Validation: everything once."""

import functools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from osdn_jax.data import (
    Document,
    JoinedWindows,
    Mixture,
    PackedWindows,
    PreparedTokens,
    TokenizedDocuments,
    TokenWindows,
    load_tokenizer,
    parse_mixture,
    training_batches,
    validation_batches,
)
from support.corpora import documents, streamed_windows, window_counts

T = 4


def numbered(count=11):
    """Windows whose first target is the number of the window, counted from 1."""
    return PackedWindows([Document("a", b"".join(bytes([i + 1]) * T for i in range(count)))], T)


def rows(batch):
    return (batch["targets"][:, 0] - 1).tolist()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_shapes_and_dtypes():
    for batch in (
        next(training_batches(numbered(), batch_size=3, seed=0)),
        *validation_batches(numbered(), batch_size=3),
    ):
        assert sorted(batch) == ["inputs", "segment_ids", "targets", "weights"]
        assert all(array.shape == (3, T) for array in batch.values())
        assert [batch[name].dtype for name in sorted(batch)] == [np.int32, np.int32, np.int32, np.float32]


def test_batches_hold_the_windows_of_the_source():
    windows = numbered()
    batch = next(training_batches(windows, batch_size=5, seed=0))
    for position, row in enumerate(rows(batch)):
        np.testing.assert_equal({name: array[position] for name, array in batch.items()}, windows[row])


def test_each_epoch_visits_every_window_in_a_new_order():
    batches = take(training_batches(numbered(), batch_size=3, seed=0), 11)
    stream = [row for batch in batches for row in rows(batch)]
    epochs = [stream[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(11)) not in epochs


def test_the_seed_decides():
    one, same, other = (take(training_batches(numbered(), batch_size=3, seed=seed), 5) for seed in (7, 7, 8))
    np.testing.assert_equal(one, same)
    assert list(map(rows, one)) != list(map(rows, other))


@pytest.mark.parametrize("shard_count", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_batches_of_one_window_equal_the_rows_of_larger_ones(mixed, shard_count):
    windows = Mixture([numbered(), numbered(2)], [2.0, 1.0]) if mixed else numbered()
    share = {"seed": 3, "shard_index": shard_count - 1, "shard_count": shard_count}
    larger = take(training_batches(windows, batch_size=5, **share), 6)
    iterator = training_batches(windows, batch_size=1, **share)
    ones = take(iterator, 15)
    state = iterator.get_state()
    ones += take(iterator, 15)
    for name in ("inputs", "targets", "segment_ids", "weights"):
        assert {batch[name].shape for batch in ones} == {(1, T)}
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in ones]), np.concatenate([batch[name] for batch in larger])
        )
    again = training_batches(windows, batch_size=1, **share)
    again.set_state(state)
    np.testing.assert_equal(take(again, 15), ones[15:])
    assert [rows(batch) for batch in validation_batches(numbered(), batch_size=1)] == [[i] for i in range(11)]


def test_corpus_smaller_than_a_batch():
    batch = next(training_batches(numbered(2), batch_size=7, seed=0))
    assert sorted(rows(batch)) in ([0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1])
    assert rows(next(training_batches(numbered(1), batch_size=3, seed=0))) == [0, 0, 0]


@pytest.mark.parametrize("before", [0, 1, 6])
def test_state_restores_the_following_batches(before):
    iterator = training_batches(numbered(), batch_size=3, seed=1)
    take(iterator, before)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 6)
    fresh = training_batches(numbered(), batch_size=3, seed=1)
    take(fresh, 2)
    fresh.set_state(state)
    np.testing.assert_equal(take(fresh, 6), expected)


def test_state_is_saved_and_restored_by_orbax(tmp_path):
    iterator = training_batches(numbered(), batch_size=3, seed=1)
    take(iterator, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = take(iterator, 6)  # the state is taken by save(), not when writing ends
        manager.wait_until_finished()
        fresh = training_batches(numbered(), batch_size=3, seed=1)
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    np.testing.assert_equal(take(fresh, 6), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_shards_divide_the_global_batch(count):
    whole = training_batches(numbered(), batch_size=2 * count, seed=3)
    shards = [
        training_batches(numbered(), batch_size=2, seed=3, shard_index=index, shard_count=count)
        for index in range(count)
    ]
    for _ in range(20):
        together = [row for shard in shards for row in rows(next(shard))]
        assert sorted(together) == sorted(rows(next(whole)))


class CountedReads:
    """A source that records which windows are read."""

    def __init__(self, windows):
        self.windows = windows
        self.read = []

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        self.read.append(index)
        return self.windows[index]


def test_a_shard_reads_only_its_share():
    counted = [CountedReads(numbered(12)) for _ in range(2)]
    for index in range(2):
        take(training_batches(counted[index], batch_size=3, seed=0, shard_index=index, shard_count=2), 2)
    assert len(counted[0].read) == len(counted[1].read) == 6
    assert sorted(counted[0].read + counted[1].read) == list(range(12))


@pytest.mark.parametrize(("windows", "batch_size"), [(11, 3), (12, 3), (2, 5), (5, 1)])
def test_validation_visits_everything_once_in_order(windows, batch_size):
    batches = validation_batches(numbered(windows), batch_size=batch_size)
    for _ in range(2):  # batches can be iterated again
        listed = list(batches)
        assert len(listed) == len(batches) == -(-windows // batch_size)
        flat = {name: np.concatenate([batch[name] for batch in listed]) for name in listed[0]}
        assert rows(flat)[:windows] == list(range(windows))
        assert all(not array[windows:].any() for array in flat.values())
        assert flat["weights"].sum() == numbered(windows).text_bytes


def test_validation_shards_have_equally_many_batches():
    whole = list(validation_batches(numbered(9), batch_size=4))
    shards = [list(validation_batches(numbered(9), batch_size=2, shard_index=i, shard_count=2)) for i in range(2)]
    assert len(shards[0]) == len(shards[1]) == 3
    for batch, *parts in zip(whole, *shards, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"batch_size": 1.0}, TypeError, "batch_size must be an integer"),
        ({"shard_count": 0}, ValueError, "shard_count must be at least 1; got 0"),
        ({"shard_index": 2, "shard_count": 2}, ValueError, r"shard_index must be in 0\.\.1, below shard_count; got 2"),
        ({"shard_index": -1}, ValueError, "shard_index must be in"),
        ({"seed": -1}, ValueError, r"seed must be in 0\.\.2\*\*32-1; got -1"),
        ({"seed": 2**32}, ValueError, "seed must be in"),
        ({"seed": 0.5}, TypeError, "float"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        training_batches(numbered(), **({"batch_size": 2, "seed": 0} | arguments))
    if "seed" not in arguments:
        with pytest.raises(error, match=message):
            validation_batches(numbered(), **({"batch_size": 2} | arguments))


def test_empty_source():
    with pytest.raises(ValueError, match="holds no windows"):
        training_batches([], batch_size=1, seed=0)
    with pytest.raises(ValueError, match="holds no windows"):
        validation_batches([], batch_size=1)


# Every kind of source


def source(corpus, kind):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    match kind:
        case "bytes":
            return PackedWindows(documents(), T)
        case "memory":
            return TokenWindows(TokenizedDocuments(documents(), tokenizer), T)
        case "prepared":
            return TokenWindows(PreparedTokens(corpus / "prepared"), T)
        case "stream":
            return streamed_windows(corpus, T)
        case "shuffled stream":
            return streamed_windows(corpus, T, shuffle=4)
        case "mixture":
            return Mixture([source(corpus, "memory"), source(corpus, "prepared")], [1, 3])
        case "mixture with a stream":
            return Mixture([source(corpus, "memory"), source(corpus, "shuffled stream")], [1, 3])


KINDS = ["bytes", "memory", "prepared", "stream", "shuffled stream", "mixture", "mixture with a stream"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_restores_the_following_batches_of_every_source(corpus, kind, tmp_path):
    batches = functools.partial(training_batches, batch_size=3, seed=1)
    iterator = batches(source(corpus, kind))
    whole = take(iterator, 45)  # several epochs
    assert all(batch["inputs"].shape == (3, T) for batch in whole)
    iterator.close()
    for before in (0, 1, 7, 18):
        iterator = batches(source(corpus, kind))
        np.testing.assert_equal(take(iterator, before), whole[:before])
        state = json.loads(json.dumps(iterator.get_state()))
        fresh = batches(source(corpus, kind))
        take(fresh, 2)
        fresh.set_state(state)
        np.testing.assert_equal(take(fresh, 20), whole[before : before + 20])
        state = json.loads(json.dumps(fresh.get_state()))  # and from the state of a resumed iterator
        again = batches(source(corpus, kind))
        again.set_state(state)
        np.testing.assert_equal(take(again, 5), whole[before + 20 : before + 25])
        for used in (iterator, fresh, again):
            used.close()


def test_a_streams_state_is_saved_by_orbax(corpus, tmp_path):
    iterator = training_batches(source(corpus, "shuffled stream"), batch_size=2, seed=1)
    take(iterator, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = take(iterator, 5)
        manager.wait_until_finished()
        fresh = training_batches(source(corpus, "shuffled stream"), batch_size=2, seed=1)
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    np.testing.assert_equal(take(fresh, 5), expected)
    iterator.close()
    fresh.close()


@pytest.mark.parametrize("kind", ["memory", "prepared", "mixture"])
def test_shards_of_every_source_divide_the_global_batch(corpus, kind):
    whole = training_batches(source(corpus, kind), batch_size=4, seed=3)
    shards = [
        training_batches(source(corpus, kind), batch_size=2, seed=3, shard_index=i, shard_count=2) for i in (0, 1)
    ]
    for _ in range(20):
        parts = window_counts([next(shards[0])]), window_counts([next(shards[1])])
        together = window_counts([next(whole)])
        assert {row: parts[0].get(row, 0) + parts[1].get(row, 0) for row in together} == together


def test_shards_of_one_epoch_are_disjoint_and_together_the_whole(corpus):
    windows = source(corpus, "prepared")
    count = len(windows)
    shards = [training_batches(windows, batch_size=1, seed=3, shard_index=i, shard_count=2) for i in (0, 1)]
    sampled = [take(shards[0], (count + 1) // 2), take(shards[1], count // 2)]
    rows = sorted(batch["inputs"][0].tolist() for batches in sampled for batch in batches)
    assert rows == sorted(window["inputs"].tolist() for window in windows)


# Mixtures


def lettered(letter, windows):
    return PackedWindows([Document(letter, letter.encode() * T * windows)], T)


def letters(batches):
    return "".join(chr(row[0]) for batch in batches for row in batch["targets"])


@pytest.mark.parametrize(("weights", "shares"), [((1, 1), (0.5, 0.5)), ((0.7, 0.3), (0.7, 0.3)), ((1, 9), (0.1, 0.9))])
def test_a_mixture_has_the_shares_of_its_weights(weights, shares):
    mixture = Mixture([lettered("a", 60), lettered("b", 100)], weights)
    sampled = letters(take(training_batches(mixture, batch_size=10, seed=0), 100))
    assert abs(sampled.count("a") / 1000 - shares[0]) < 0.01
    for start in range(0, 1000, 100):  # in every stretch
        assert abs(sampled[start : start + 100].count("b") / 100 - shares[1]) <= 0.02


def test_each_source_of_a_mixture_is_visited_evenly():
    texts = [bytes([1 + i]) * T for i in range(6)]
    mixture = Mixture([PackedWindows([Document("a", b"".join(texts))], T), lettered("z", 3)], [2, 1])
    sampled = letters(take(training_batches(mixture, batch_size=3, seed=0), 60)).replace("z", "")
    assert len(sampled) >= 114
    for start in range(0, 114, 6):
        assert len(set(sampled[start : start + 6])) == 6
    assert sampled[:6] != sampled[6:12]


def test_sources_of_a_mixture_are_shuffled_differently():
    part = PackedWindows([Document("a", b"".join(bytes([1 + i]) * T for i in range(20)))], T)
    sampled = letters(take(training_batches(Mixture([part, part], [1, 1]), batch_size=40, seed=0), 1))
    assert set(sampled[::2]) == set(sampled[1::2])
    assert sampled[::2] != sampled[1::2]


def test_joined_windows():
    joined = JoinedWindows([lettered("a", 2), lettered("b", 1)])
    assert [chr(joined[i]["targets"][0]) for i in range(len(joined))] == ["a", "a", "b"]
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"window {index} of 3"):
            joined[index]


def test_parsing_a_mixture():
    assert parse_mixture("a/b.jsonl:0.7, hf:org/name:2") == [("a/b.jsonl", 0.7), ("hf:org/name", 2.0)]
    for text, message in (
        ("a", "expected path:weight,path:weight; got 'a' in 'a'"),
        ("a:1,", "got '' in 'a:1,'"),
        (":1", "got ':1'"),
        ("a:b", "weight of a: got 'b', expected a number"),
        ("a:0", "must be positive and finite; got 0.0"),
        ("a:-1", "positive and finite; got -1.0"),
        ("a:nan", "positive and finite; got nan"),
        ("a:inf", "positive and finite; got inf"),
        ("a:1,b:inf", "weight of b: weights of a mixture must be positive and finite; got inf"),
        ("a:1e-320", "weight of a: weights of a mixture must be at least 1e-300, .* got 9.99989e-321"),
        ("a:1,b:1e-320", "weight of b: weights of a mixture must be at least 1e-300, .* got 9.99989e-321"),
        ("a:1e300,b:1", "weight of b: .* and 1e-12 of the largest, 1e.300; got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_mixture(text)


@pytest.mark.parametrize("weights", [(1e-300, 1e-300), (1e308, 1e308), (1, 1e-12), (1e12, 1), (3e-300, 1e-300)])
@pytest.mark.parametrize("streamed", [False, True])
def test_extreme_weights_are_respected(corpus, weights, streamed):
    other = streamed_windows(corpus, T) if streamed else lettered("b", 3)
    batches = training_batches(Mixture([lettered("a", 2), other], weights), batch_size=40, seed=0)
    sampled = letters(take(batches, 1)).count("a") / 40
    assert abs(sampled - weights[0] / (weights[0] / 2 + weights[1] / 2) / 2) <= 0.05
    batches.close()


def test_bad_mixtures():
    part = lettered("a", 2)
    with pytest.raises(ValueError, match="must be at least 1e-300, and 1e-12 of the largest, 1; got 9.99989e-321"):
        Mixture([part, part], [1e-320, 1])
    with pytest.raises(ValueError, match="needs sources and a weight for each; got 1, 2 weights"):
        Mixture([part], [1, 2])
    with pytest.raises(ValueError, match="needs sources and a weight for each; got 0, 0 weights"):
        Mixture([], [])
    with pytest.raises(ValueError, match="must be positive and finite; got 0"):
        Mixture([part, part], [1, 0])
