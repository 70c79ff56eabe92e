"""Bytes as tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osdn_jax.data import ByteTokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(TEXT)
def test_decode_inverts_encode(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, bos=True).tolist() == [0, *ids]
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


@given(st.lists(st.integers(0, 255)), st.data())
def test_streamed_pieces_join_to_the_whole(ids, data):
    decoder = ByteTokenizer().stream_decoder()
    pieces, rest = [], ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(decoder.push(rest[:size]))
        rest = rest[size:]
    assert "".join([*pieces, decoder.finish()]) == ByteTokenizer().decode(ids)


def test_streaming_holds_back_half_a_character():
    decoder = ByteTokenizer().stream_decoder()
    assert [decoder.push(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]
    assert decoder.finish() == ""
    assert decoder.push(np.int32(0xC3)) == ""
    assert decoder.finish() == "\N{REPLACEMENT CHARACTER}"
    assert decoder.push(np.array(ord("b"))) == "b"


def test_decode_replaces_what_is_not_utf8():
    assert ByteTokenizer().decode(np.array([ord("a"), 0xFF, ord("b")])) == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (b"bytes", TypeError, "str; got bytes"),
        ("ab\0", ValueError, "character 2"),
        ("a\ud800", ValueError, "surrogate at character 1"),
    ],
)
def test_encode_rejects(text, error, message):
    with pytest.raises(error, match=message):
        ByteTokenizer().encode(text)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1, 256], ValueError, "256 at position 1"),
        ([-1], ValueError, "-1 at position 0"),
        ([1.5], TypeError, "float64"),
        ([[1]], ValueError, r"\[1, 1\]"),
    ],
)
def test_decode_rejects(ids, error, message):
    with pytest.raises(error, match=message):
        ByteTokenizer().decode(ids)
