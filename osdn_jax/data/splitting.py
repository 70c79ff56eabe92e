"""A held-out part of a user's own text."""

from collections.abc import Iterable

import numpy as np

from osdn_jax.data.documents import Document


def split_documents(
    documents: Iterable[Document], validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """(train, validation): about `validation_fraction` of the bytes held out, the same for the same arguments.

    Whole documents, chosen at random by `seed`, are held out where documents are small enough for it: where what they
    come to is within a factor of two of the wanted bytes and some text is left to train on. Otherwise (one long text,
    say) the tail of the text is held out, in document order and whatever the seed, and the document it starts in is
    cut after a line, or between two characters if it has no line end there, into "name (head)" and "name (tail)".

    Raises ValueError if the fraction is not strictly between 0 and 1, if the seed is negative, if there is no
    document, or if there is too little text for both parts; TypeError for what is not a Document.
    """
    documents = list(documents)
    for document in documents:
        if not isinstance(document, Document):
            raise TypeError(f"documents must be Document(name, text); got {type(document).__name__}")
    if isinstance(validation_fraction, bool) or not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, both excluded; got {validation_fraction!r}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    if not documents:
        raise ValueError("there are no documents to split")
    wanted = validation_fraction * _size(documents)
    train, validation = _whole_documents(documents, wanted, seed)
    if not wanted / 2 <= _size(validation) <= 2 * wanted or not _size(train):
        train, validation = _tail(documents, wanted)
    if not _size(train) or not _size(validation):
        raise ValueError(
            f"cannot hold out {validation_fraction:g} of {_size(documents)} bytes: one of the parts would be empty"
        )
    return train, validation


def _size(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _whole_documents(documents: list[Document], wanted: float, seed: int) -> tuple[list[Document], list[Document]]:
    held: set[int] = set()
    size = 0
    for index in np.random.default_rng(seed).permutation(len(documents)).tolist():
        length = len(documents[index].text)
        # Take it only if that brings the held-out size nearer to what is wanted.
        if length < 2 * (wanted - size):
            held.add(index)
            size += length
    train = [document for index, document in enumerate(documents) if index not in held]
    return train, [document for index, document in enumerate(documents) if index in held]


def _tail(documents: list[Document], wanted: float) -> tuple[list[Document], list[Document]]:
    first = len(documents) - 1
    missing = wanted - len(documents[first].text)  # below 0: what the document keeps to train on
    while first and missing > 0:
        first -= 1
        missing -= len(documents[first].text)
    name, text = documents[first]
    cut = _cut(text, round(-missing))
    head, tail = text[:cut], text[cut:]
    if not head:
        return documents[:first], documents[first:]
    if not tail:
        return documents[: first + 1], documents[first + 1 :]
    train = [*documents[:first], Document(f"{name} (head)", head)]
    return train, [Document(f"{name} (tail)", tail), *documents[first + 1 :]]


def _cut(text: bytes, near: int) -> int:
    """The place to cut: after the last line end before `near`, else at or before `near` between two characters."""
    line = text.rfind(b"\n", 0, near) + 1
    # A line far back would move much text into the held-out part, so it counts only within a tenth of that part.
    if line and near - line <= (len(text) - near) / 10:
        return line
    while 0 < near < len(text) and text[near] & 0xC0 == 0x80:  # inside a UTF-8 character
        near -= 1
    return near
