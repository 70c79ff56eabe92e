"""Windows: which tokens are targets, where segments start, what is padding."""

import pickle

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osdn_jax.data import ByteDocuments, Document, PackedWindows, TokenizedDocuments, TokenWindows, load_tokenizer
from support.corpora import all_tokens
from support.corpora import documents as corpus_documents

DOCUMENTS = st.lists(st.binary(max_size=20).map(lambda text: text.replace(b"\0", b"\x01")), min_size=1, max_size=8)


def packed(texts, length):
    return PackedWindows([Document(str(i), text) for i, text in enumerate(texts)], length)


def test_a_small_case_in_full():
    windows = packed([b"ab", b"c"], 3)  # stream: 0 a b 0 c
    assert len(windows) == 2
    expected = [
        {"inputs": [0, 97, 98], "targets": [97, 98, 0], "segment_ids": [1, 1, 1], "weights": [1, 1, 0]},
        {"inputs": [0, 0, 0], "targets": [99, 0, 0], "segment_ids": [1, 0, 0], "weights": [1, 0, 0]},
    ]
    for window, values in zip(windows, expected, strict=True):
        assert {name: array.tolist() for name, array in window.items()} == values
        assert {name: array.dtype for name, array in window.items()} == {
            "inputs": np.int32,
            "targets": np.int32,
            "segment_ids": np.int32,
            "weights": np.float32,
        }


def test_segments_count_from_one_in_each_window():
    windows = packed([b"abc", b"d", b"efghij"], 4)  # stream: 0 a b c | 0 d 0 e | f g h i (j)
    assert [window["segment_ids"].tolist() for window in windows] == [[1, 1, 1, 1], [1, 1, 2, 2], [1, 1, 1, 1]]
    assert windows[2]["targets"].tolist() == [*b"ghij"]


@given(DOCUMENTS.filter(any), st.integers(1, 30))
def test_every_byte_is_a_target_once_after_its_predecessor(texts, length):
    windows = packed(texts, length)
    seen = []
    previous_target = 0
    for window in windows:
        assert all(array.shape == (length,) for array in window.values())
        starts = 0
        for position, (token, target, segment, weight) in enumerate(zip(*window.values(), strict=True)):
            if segment == 0:
                assert (token, target, weight) == (0, 0, 0)
                continue
            assert token == previous_target
            starts += int(token == 0 or position == 0)
            assert segment == starts
            assert weight == (target != 0)
            previous_target = target
            if target:
                seen.append(int(target))
    text = b"".join(texts)
    assert bytes(seen) == text
    assert windows.text_bytes == len(text) == sum(window["weights"].sum() for window in windows)


@given(DOCUMENTS.filter(any), st.integers(1, 10))
def test_padding_is_at_the_very_end_only(texts, length):
    windows = packed(texts, length)
    present = np.concatenate([window["segment_ids"] for window in windows]) > 0
    assert present.sum() == sum(len(text) + 1 for text in texts) - 1
    assert present[: present.sum()].all()
    assert windows[len(windows) - 1]["segment_ids"][0] == 1


def test_indexing():
    windows = packed([b"abcdefg"], 3)
    assert windows[-1]["targets"].tolist() == windows[np.int64(2)]["targets"].tolist()
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"window {index} of 3"):
            windows[index]
    with pytest.raises(TypeError):
        windows[0.5]


def test_grain_takes_it_and_it_pickles():
    windows = packed([b"some text", b"and more"], 4)
    assert isinstance(windows, grain.sources.RandomAccessDataSource)
    copy = pickle.loads(pickle.dumps(windows))
    assert repr(copy) == repr(windows) == "PackedWindows(5 windows of 4, 17 bytes of text)"
    for one, other in zip(windows, copy, strict=True):
        np.testing.assert_equal(one, other)


def test_windows_do_not_share_memory_with_the_source():
    windows = packed([b"abcd"], 2)
    windows[0]["inputs"][:] = 7
    assert windows[0]["inputs"].tolist() == [0, 97]


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (0, ValueError, "sequence length must be at least 1; got 0"),
        (-3, ValueError, "sequence length must be at least 1; got -3"),
        (2.5, TypeError, r"sequence length must be an integer; got 2.5 \(float\)"),
        ("8", TypeError, r"sequence length must be an integer; got '8' \(str\)"),
        (True, TypeError, "sequence length must be an integer; got True"),
        (None, TypeError, "sequence length must be an integer; got None"),
    ],
)
def test_bad_sequence_length(length, error, message):
    with pytest.raises(error, match=message):
        packed([b"text"], length)


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ([], ValueError, "hold no text"),
        ([Document("a", b"")], ValueError, "hold no text"),
        ([Document("a", b"ab\0")], ValueError, "document 'a' holds byte 0, the start token, at offset 2"),
        ([Document("a", "text")], TypeError, "text of document 'a' must be bytes; got str"),
        ([b"text"], TypeError, "must be Document"),
    ],
)
def test_bad_documents(documents, error, message):
    with pytest.raises(error, match=message):
        PackedWindows(documents, 4)


@pytest.mark.parametrize("length", [1, 4, 30])
def test_byte_documents_equal_documents_tokenised_as_bytes(length):
    for a, b in zip(
        PackedWindows(corpus_documents(), length),
        TokenWindows(TokenizedDocuments(corpus_documents(), load_tokenizer()), length),
        strict=True,
    ):
        np.testing.assert_equal(a, b)
    as_bytes, tokenised = ByteDocuments(corpus_documents()), TokenizedDocuments(corpus_documents(), load_tokenizer())
    assert all_tokens(as_bytes) == all_tokens(tokenised)
    assert (as_bytes.start_id, as_bytes.text_tokens, as_bytes.text_bytes) == (0, 222, 222)
    assert (tokenised.start_id, tokenised.text_tokens, tokenised.text_bytes) == (0, 222, 222)


def test_documents_without_tokens_and_text_that_cannot_be_encoded(corpus):
    with pytest.raises(ValueError, match="hold no text"):
        TokenizedDocuments([], load_tokenizer(corpus / "tokenizer.json"))
    with pytest.raises(ValueError, match="document 'x': text must not hold the NUL"):
        TokenizedDocuments([Document("x", b"\0")], load_tokenizer())
