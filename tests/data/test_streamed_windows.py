"""Windows over a stream of documents: cut like documents in memory, divided between processes, shuffled."""

import numpy as np
import pytest

from osdn_jax.data import (
    HubStream,
    StreamedWindows,
    TokenizedDocuments,
    TokenWindows,
    load_tokenizer,
    training_batches,
)
from osdn_jax.data.streamed_windows import digest
from support.corpora import TEXTS, documents, streamed_windows, window_counts

T = 5


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def text_of(windows, tokenizer, tokens):
    """Return the first `tokens` tokens of the stream that the windows were cut from."""
    inputs = np.concatenate([window["inputs"] for window in windows])
    targets = np.concatenate([window["targets"] for window in windows])
    assert (inputs[1:] == targets[:-1]).all()  # every window continues the previous one
    assert all(window["weights"].tolist() == (window["targets"] != tokenizer.bos_id).tolist() for window in windows)
    return inputs[:tokens].tolist()


def test_a_stream_is_cut_like_documents_in_memory(corpus):
    memory = TokenizedDocuments(documents(), load_tokenizer(corpus / "tokenizer.json"))
    whole = memory.read(0, len(memory)).tolist()
    windows = take(iter(streamed_windows(corpus, T).dataset(seed=0)), 3 * len(whole) // T + 1)
    assert text_of(windows, load_tokenizer(corpus / "tokenizer.json"), 3 * len(whole)) == whole * 3
    for window, other in zip(windows, TokenWindows(memory, T), strict=False):
        if other["segment_ids"].all():
            np.testing.assert_equal({k: window[k] for k in ("inputs", "segment_ids")}, {
                k: other[k] for k in ("inputs", "segment_ids")
            })  # fmt: skip


def test_a_stream_leaves_out_held_out_documents(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    held = [digest(document) for document in documents()[1:3]]
    kept = TokenizedDocuments([documents()[0], *documents()[3:]], tokenizer)
    whole = kept.read(0, len(kept)).tolist()
    windows = take(iter(streamed_windows(corpus, T, held_out=held).dataset(seed=0)), 2 * len(whole) // T + 1)
    assert text_of(windows, tokenizer, 2 * len(whole)) == whole * 2
    with pytest.raises(ValueError, match="the stream holds no documents to train on"):
        next(iter(streamed_windows(corpus, T, held_out=map(digest, documents())).dataset(seed=0)))


def test_shares_of_a_stream_are_disjoint_and_together_the_whole(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer.json")
    seen = []
    for index in range(2):
        share = list(HubStream(f"hf:{corpus / 'set'}", shard_index=index, shard_count=2))
        memory = TokenizedDocuments(share, tokenizer)
        windows = streamed_windows(corpus, T).dataset(seed=0, shard_index=index, shard_count=2)
        windows = take(iter(windows), len(memory) // T + 1)
        assert text_of(windows, tokenizer, len(memory)) == memory.read(0, len(memory)).tolist()
        seen += [document.text.decode() for document in share]
    assert sorted(seen) == sorted(TEXTS)


def test_windows_of_a_stream_are_shuffled_by_the_seed(corpus):
    plain = window_counts(take(training_batches(streamed_windows(corpus, T), batch_size=2, seed=0), 4))
    batches = [
        take(training_batches(streamed_windows(corpus, T, shuffle=8), batch_size=2, seed=seed), 4) for seed in (0, 0, 1)
    ]
    np.testing.assert_equal(batches[0], batches[1])
    assert all(window_counts(some) == plain for some in batches)
    assert len({tuple(window_counts(some)) for some in batches} | {tuple(plain)}) == 3


def test_bad_arguments():
    with pytest.raises(ValueError, match="sequence length must be at least 1; got 0"):
        StreamedWindows(lambda index, count: None, load_tokenizer(), 0)
    with pytest.raises(ValueError, match="shuffle must be at least 1; got 0"):
        StreamedWindows(lambda index, count: None, load_tokenizer(), T, shuffle=0)
