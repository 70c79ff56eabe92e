"""Training batches from every kind of source: resumed exactly, shared between processes, mixed by weight."""

import functools
import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from osdn_jax.data import (
    Document,
    HubStream,
    JoinedWindows,
    Mixture,
    PackedWindows,
    PreparedTokens,
    StreamedWindows,
    TokenizedDocuments,
    TokenWindows,
    load_tokenizer,
    parse_mixture,
    training_batches,
)
from osdn_jax.data.prepare import prepare
from osdn_jax.data.streamed_windows import digest
from support.corpora import TEXTS, documents, write_jsonl, write_sentencepiece, write_tokenizer

T = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_tokenizer(folder / "tokenizer.json")
    write_sentencepiece(folder / "spm.model")
    write_jsonl(folder / "rows.jsonl")
    prepare(folder / "rows.jsonl", folder / "prepared", tokenizer=folder / "tokenizer.json", shard_bytes=60)
    (folder / "set").mkdir()
    write_jsonl(folder / "set" / "train-0.jsonl", TEXTS[:3])
    write_jsonl(folder / "set" / "train-1.jsonl", TEXTS[3:])
    return folder


def stream(corpus, **options):
    def opened(index, count):
        return HubStream(f"hf:{corpus / 'set'}", shard_index=index, shard_count=count)

    return StreamedWindows(opened, load_tokenizer(corpus / "tokenizer.json"), T, **options)


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
            return stream(corpus)
        case "shuffled stream":
            return stream(corpus, shuffle=4)
        case "mixture":
            return Mixture([source(corpus, "memory"), source(corpus, "prepared")], [1, 3])
        case "mixture with a stream":
            return Mixture([source(corpus, "memory"), source(corpus, "shuffled stream")], [1, 3])


KINDS = ["bytes", "memory", "prepared", "stream", "shuffled stream", "mixture", "mixture with a stream"]


def take(iterator, count):
    return list(itertools.islice(iterator, count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_restores_the_following_batches(corpus, kind, tmp_path):
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
        state = json.loads(json.dumps(fresh.get_state()))  # and from a state of an iterator that was resumed itself
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


def words(batches):
    """{the tokens of a window: how often}"""
    rows = [row.tobytes() for batch in batches for row in np.concatenate([batch["inputs"], batch["targets"]], -1)]
    return {row: rows.count(row) for row in rows}


@pytest.mark.parametrize("kind", ["memory", "prepared", "mixture"])
def test_shards_divide_the_global_batch(corpus, kind):
    whole = training_batches(source(corpus, kind), batch_size=4, seed=3)
    shards = [
        training_batches(source(corpus, kind), batch_size=2, seed=3, shard_index=i, shard_count=2) for i in (0, 1)
    ]
    for _ in range(20):
        parts = words([next(shards[0])]), words([next(shards[1])])
        together = words([next(whole)])
        assert {row: parts[0].get(row, 0) + parts[1].get(row, 0) for row in together} == together


def test_shards_of_one_epoch_are_disjoint_and_together_the_whole(corpus):
    windows = source(corpus, "prepared")
    count = len(windows)
    shards = [training_batches(windows, batch_size=1, seed=3, shard_index=i, shard_count=2) for i in (0, 1)]
    drawn = [take(shards[0], (count + 1) // 2), take(shards[1], count // 2)]
    rows = sorted(batch["inputs"][0].tolist() for batches in drawn for batch in batches)
    assert rows == sorted(window["inputs"].tolist() for window in windows)


# Streams


def text_of(windows, tokenizer, tokens):
    """The stream that the windows cut, of this many tokens."""
    inputs = np.concatenate([window["inputs"] for window in windows])
    targets = np.concatenate([window["targets"] for window in windows])
    assert (inputs[1:] == targets[:-1]).all()  # every window follows the one before
    assert all(window["weights"].tolist() == (window["targets"] != tokenizer.bos_id).tolist() for window in windows)
    return inputs[:tokens].tolist()


def test_a_stream_is_cut_as_the_documents_in_memory_are(corpus):
    memory = TokenizedDocuments(documents(), load_tokenizer(corpus / "tokenizer.json"))
    whole = memory.read(0, len(memory)).tolist()
    windows = take(iter(stream(corpus).dataset(seed=0)), 3 * len(whole) // T + 1)
    assert text_of(windows, load_tokenizer(corpus / "tokenizer.json"), 3 * len(whole)) == whole * 3
    for window, other in zip(windows, TokenWindows(memory, T), strict=False):
        if other["segment_ids"].all():
            np.testing.assert_equal({k: window[k] for k in ("inputs", "segment_ids")}, {
                k: other[k] for k in ("inputs", "segment_ids")
            })  # fmt: skip


def test_a_stream_leaves_out_what_is_held_out(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    held = [digest(document) for document in documents()[1:3]]
    kept = TokenizedDocuments([documents()[0], *documents()[3:]], tokenizer)
    whole = kept.read(0, len(kept)).tolist()
    windows = take(iter(stream(corpus, held_out=held).dataset(seed=0)), 2 * len(whole) // T + 1)
    assert text_of(windows, tokenizer, 2 * len(whole)) == whole * 2
    with pytest.raises(ValueError, match="the stream holds no documents to train on"):
        next(iter(stream(corpus, held_out=map(digest, documents())).dataset(seed=0)))


def test_shares_of_a_stream_are_disjoint_and_together_the_whole(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    seen = []
    for index in range(2):
        share = list(HubStream(f"hf:{corpus / 'set'}", shard_index=index, shard_count=2))
        memory = TokenizedDocuments(share, tokenizer)
        windows = stream(corpus).dataset(seed=0, shard_index=index, shard_count=2)
        windows = take(iter(windows), len(memory) // T + 1)
        assert text_of(windows, tokenizer, len(memory)) == memory.read(0, len(memory)).tolist()
        seen += [document.text.decode() for document in share]
    assert sorted(seen) == sorted(TEXTS)


def test_windows_of_a_stream_are_shuffled_by_the_seed(corpus):
    plain = words(take(training_batches(stream(corpus), batch_size=2, seed=0), 4))
    batches = [take(training_batches(stream(corpus, shuffle=8), batch_size=2, seed=seed), 4) for seed in (0, 0, 1)]
    np.testing.assert_equal(batches[0], batches[1])
    assert all(words(some) == plain for some in batches)
    assert len({tuple(words(some)) for some in batches} | {tuple(plain)}) == 3


# Mixtures


def lettered(letter, windows):
    return PackedWindows([Document(letter, letter.encode() * T * windows)], T)


def letters(batches):
    return "".join(chr(row[0]) for batch in batches for row in batch["targets"])


@pytest.mark.parametrize(("weights", "shares"), [((1, 1), (0.5, 0.5)), ((0.7, 0.3), (0.7, 0.3)), ((1, 9), (0.1, 0.9))])
def test_a_mixture_has_the_shares_of_its_weights(weights, shares):
    mixture = Mixture([lettered("a", 60), lettered("b", 100)], weights)
    drawn = letters(take(training_batches(mixture, batch_size=10, seed=0), 100))
    assert abs(drawn.count("a") / 1000 - shares[0]) < 0.01
    for start in range(0, 1000, 100):  # anywhere
        assert abs(drawn[start : start + 100].count("b") / 100 - shares[1]) <= 0.02


def test_each_part_of_a_mixture_is_visited_evenly():
    texts = [bytes([1 + i]) * T for i in range(6)]
    mixture = Mixture([PackedWindows([Document("a", b"".join(texts))], T), lettered("z", 3)], [2, 1])
    drawn = letters(take(training_batches(mixture, batch_size=3, seed=0), 60)).replace("z", "")
    assert len(drawn) >= 114
    for start in range(0, 114, 6):
        assert len(set(drawn[start : start + 6])) == 6
    assert drawn[:6] != drawn[6:12]


def test_parts_of_a_mixture_are_in_orders_of_their_own():
    part = PackedWindows([Document("a", b"".join(bytes([1 + i]) * T for i in range(20)))], T)
    drawn = letters(take(training_batches(Mixture([part, part], [1, 1]), batch_size=40, seed=0), 1))
    assert set(drawn[::2]) == set(drawn[1::2])
    assert drawn[::2] != drawn[1::2]


def test_windows_joined():
    joined = JoinedWindows([lettered("a", 2), lettered("b", 1)])
    assert [chr(joined[i]["targets"][0]) for i in range(len(joined))] == ["a", "a", "b"]
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"window {index} of 3"):
            joined[index]


def test_parsing_a_mixture():
    assert parse_mixture("a/b.jsonl:0.7, hf:org/name:2") == [("a/b.jsonl", 0.7), ("hf:org/name", 2.0)]
    for text, said in (
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
        with pytest.raises(ValueError, match=said):
            parse_mixture(text)


@pytest.mark.parametrize("weights", [(1e-300, 1e-300), (1e308, 1e308), (1, 1e-12), (1e12, 1), (3e-300, 1e-300)])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_smallest_and_largest_weights_draw(corpus, weights, streamed):
    other = stream(corpus) if streamed else lettered("b", 3)
    batches = training_batches(Mixture([lettered("a", 2), other], weights), batch_size=40, seed=0)
    drawn = letters(take(batches, 1)).count("a") / 40
    assert abs(drawn - weights[0] / (weights[0] / 2 + weights[1] / 2) / 2) <= 0.05
    batches.close()


def test_bad_mixtures_and_streams(corpus):
    part = lettered("a", 2)
    with pytest.raises(ValueError, match="must be at least 1e-300, and 1e-12 of the largest, 1; got 9.99989e-321"):
        Mixture([part, part], [1e-320, 1])
    with pytest.raises(ValueError, match="needs sources and a weight for each; got 1, 2 weights"):
        Mixture([part], [1, 2])
    with pytest.raises(ValueError, match="needs sources and a weight for each; got 0, 0 weights"):
        Mixture([], [])
    with pytest.raises(ValueError, match="must be positive and finite; got 0"):
        Mixture([part, part], [1, 0])
    with pytest.raises(ValueError, match="sequence length must be at least 1; got 0"):
        StreamedWindows(lambda index, count: None, load_tokenizer(), 0)
    with pytest.raises(ValueError, match="shuffle must be at least 1; got 0"):
        StreamedWindows(lambda index, count: None, load_tokenizer(), T, shuffle=0)
    with pytest.raises(ValueError, match="hold no text"):
        TokenizedDocuments([], load_tokenizer(corpus / "tokenizer.json"))
    with pytest.raises(ValueError, match="document 'x': text must not hold the NUL"):
        TokenizedDocuments([Document("x", b"\0")], load_tokenizer())


@pytest.mark.parametrize("length", [1, 4, 30])
def test_bytes_are_cut_as_packed_windows_cut_them(length):
    for a, b in zip(
        PackedWindows(documents(), length),
        TokenWindows(TokenizedDocuments(documents(), load_tokenizer()), length),
        strict=True,
    ):
        np.testing.assert_equal(a, b)
