"""Training batches: reproducible, resumable, shared between processes. Validation batches: everything once."""

import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from osdn_jax.data import Document, Mixture, PackedWindows, training_batches, validation_batches

T = 4


def source(windows=11):
    """Windows whose first target says which window it is: byte i + 1."""
    return PackedWindows([Document("a", b"".join(bytes([i + 1]) * T for i in range(windows)))], T)


def rows(batch):
    return (batch["targets"][:, 0] - 1).tolist()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_shapes_and_dtypes():
    for batch in (next(training_batches(source(), batch_size=3, seed=0)), *validation_batches(source(), batch_size=3)):
        assert sorted(batch) == ["inputs", "segment_ids", "targets", "weights"]
        assert all(array.shape == (3, T) for array in batch.values())
        assert [batch[name].dtype for name in sorted(batch)] == [np.int32, np.int32, np.int32, np.float32]


def test_batches_hold_the_windows_of_the_source():
    windows = source()
    batch = next(training_batches(windows, batch_size=5, seed=0))
    for position, row in enumerate(rows(batch)):
        np.testing.assert_equal({name: array[position] for name, array in batch.items()}, windows[row])


def test_each_epoch_visits_every_window_in_an_order_of_its_own():
    batches = take(training_batches(source(), batch_size=3, seed=0), 11)
    stream = [row for batch in batches for row in rows(batch)]
    epochs = [stream[start : start + 11] for start in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(11)) not in epochs


def test_the_seed_decides():
    one, same, other = (take(training_batches(source(), batch_size=3, seed=seed), 5) for seed in (7, 7, 8))
    np.testing.assert_equal(one, same)
    assert list(map(rows, one)) != list(map(rows, other))


@pytest.mark.parametrize("shard_count", [1, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_batches_of_one_window_are_the_rows_of_larger_ones(mixed, shard_count):
    windows = Mixture([source(), source(2)], [2.0, 1.0]) if mixed else source()
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
    assert [rows(batch) for batch in validation_batches(source(), batch_size=1)] == [[i] for i in range(11)]


def test_corpus_smaller_than_a_batch():
    batch = next(training_batches(source(2), batch_size=7, seed=0))
    assert sorted(rows(batch)) in ([0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1])
    assert rows(next(training_batches(source(1), batch_size=3, seed=0))) == [0, 0, 0]


@pytest.mark.parametrize("before", [0, 1, 6])
def test_state_restores_the_following_batches(before):
    iterator = training_batches(source(), batch_size=3, seed=1)
    take(iterator, before)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 6)
    fresh = training_batches(source(), batch_size=3, seed=1)
    take(fresh, 2)
    fresh.set_state(state)
    np.testing.assert_equal(take(fresh, 6), expected)


def test_state_is_saved_and_restored_by_orbax(tmp_path):
    iterator = training_batches(source(), batch_size=3, seed=1)
    take(iterator, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        expected = take(iterator, 6)  # the state is taken by save(), not when writing ends
        manager.wait_until_finished()
        fresh = training_batches(source(), batch_size=3, seed=1)
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    np.testing.assert_equal(take(fresh, 6), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_shards_divide_the_global_batch(count):
    whole = training_batches(source(), batch_size=2 * count, seed=3)
    shards = [
        training_batches(source(), batch_size=2, seed=3, shard_index=index, shard_count=count) for index in range(count)
    ]
    for _ in range(20):
        together = [row for shard in shards for row in rows(next(shard))]
        assert sorted(together) == sorted(rows(next(whole)))


class CountedReads:
    """A source that notes which windows are read."""

    def __init__(self, windows):
        self.windows = windows
        self.read = []

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        self.read.append(index)
        return self.windows[index]


def test_a_shard_reads_only_its_share():
    counted = [CountedReads(source(12)) for _ in range(2)]
    for index in range(2):
        take(training_batches(counted[index], batch_size=3, seed=0, shard_index=index, shard_count=2), 2)
    assert len(counted[0].read) == len(counted[1].read) == 6
    assert sorted(counted[0].read + counted[1].read) == list(range(12))


@pytest.mark.parametrize(("windows", "batch_size"), [(11, 3), (12, 3), (2, 5), (5, 1)])
def test_validation_visits_everything_once_in_order(windows, batch_size):
    batches = validation_batches(source(windows), batch_size=batch_size)
    for _ in range(2):  # it can be iterated again
        listed = list(batches)
        assert len(listed) == len(batches) == -(-windows // batch_size)
        flat = {name: np.concatenate([batch[name] for batch in listed]) for name in listed[0]}
        assert rows(flat)[:windows] == list(range(windows))
        assert all(not array[windows:].any() for array in flat.values())
        assert flat["weights"].sum() == source(windows).text_bytes


def test_validation_shards_have_equally_many_batches():
    whole = list(validation_batches(source(9), batch_size=4))
    shards = [list(validation_batches(source(9), batch_size=2, shard_index=i, shard_count=2)) for i in range(2)]
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
        training_batches(source(), **({"batch_size": 2, "seed": 0} | arguments))
    if "seed" not in arguments:
        with pytest.raises(error, match=message):
            validation_batches(source(), **({"batch_size": 2} | arguments))


def test_empty_source():
    with pytest.raises(ValueError, match="holds no windows"):
        training_batches([], batch_size=1, seed=0)
    with pytest.raises(ValueError, match="holds no windows"):
        validation_batches([], batch_size=1)
