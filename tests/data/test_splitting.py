"""Held-out parts of a user's text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osdn_jax.data import Document, split_documents


def size(documents):
    return sum(len(document.text) for document in documents)


def many(count=40):
    return [Document(f"d{i}", bytes([65 + i % 26]) * (50 + i)) for i in range(count)]


def test_whole_documents_are_held_out_if_there_are_enough():
    documents = many()
    train, validation = split_documents(documents, 0.1, seed=0)
    assert sorted(train + validation) == sorted(documents)
    assert train == [document for document in documents if document in train]
    assert 0.05 * size(documents) <= size(validation) <= 0.2 * size(documents)


def test_the_seed_decides():
    assert split_documents(many(), 0.1, seed=1) == split_documents(many(), 0.1, seed=1)
    assert split_documents(many(), 0.1, seed=1) != split_documents(many(), 0.1, seed=2)


def test_one_text_is_cut_after_a_line():
    lines = [b"line %03d\n" % i for i in range(100)]
    train, validation = split_documents([Document("book", b"".join(lines))], 0.105, seed=0)
    assert train == [Document("book (head)", b"".join(lines[:89]))]
    assert validation == [Document("book (tail)", b"".join(lines[89:]))]


def test_text_without_lines_is_cut_between_characters():
    text = "é" * 50 + "x"
    (head,), (tail,) = split_documents([Document("a", text.encode())], 0.3, seed=0)
    assert head.text.decode() + tail.text.decode() == text


def test_few_documents_lose_their_tail():
    documents = [Document("a", b"a" * 100), Document("b", b"b" * 100)]
    assert split_documents(documents, 0.1, seed=0) == (
        [documents[0], Document("b (head)", b"b" * 80)],
        [Document("b (tail)", b"b" * 20)],
    )


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_every_byte_is_in_exactly_one_part(texts, fraction, seed):
    documents = [Document(str(i), text.encode()) for i, text in enumerate(texts)]
    try:
        train, validation = split_documents(documents, fraction, seed)
    except ValueError:
        # Only text of a few characters cannot be divided.
        assert size(documents) * min(fraction, 1 - fraction) < 4
        return
    assert size(train)
    assert size(validation)
    assert sorted(b"".join(document.text for document in train + validation)) == sorted("".join(texts).encode())
    for document in train + validation:
        document.text.decode()


@pytest.mark.parametrize(
    ("documents", "fraction", "error", "message"),
    [
        ([], 0.1, ValueError, "no documents"),
        (many(), 0, ValueError, "validation_fraction must be between 0 and 1"),
        (many(), 1.0, ValueError, "validation_fraction must be between 0 and 1"),
        (many(), float("nan"), ValueError, "validation_fraction must be between 0 and 1"),
        ([Document("a", b"a")], 0.5, ValueError, "would be empty"),
        ([Document("a", b"")], 0.5, ValueError, "would be empty"),
        (["text"], 0.5, TypeError, "must be Document"),
    ],
)
def test_bad_input(documents, fraction, error, message):
    with pytest.raises(error, match=message):
        split_documents(documents, fraction, seed=0)


def test_negative_seed():
    with pytest.raises(ValueError, match="seed must not be negative; got -1"):
        split_documents(many(), 0.1, seed=-1)
