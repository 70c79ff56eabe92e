"""A held-out part of a user's own text."""

from collections.abc import Iterable

import numpy as np

from osdn_jax.data.documents import Document


def split_documents(
    documents: Iterable[Document], validation_fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Hold out about `validation_fraction` of the bytes for validation, the same ones for the same arguments.

    Whole documents, chosen at random by `seed`, are held out if documents are small enough: if the chosen ones add up
    to within a factor of two of the requested bytes and some text remains to train on. Otherwise (one long text, say)
    the tail of the text is held out, in document order and independently of the seed. The document at the boundary is
    cut after a line, or between two characters if no line ends nearby, into "name (head)" and "name (tail)".

    Args:
        documents: the text.
        validation_fraction: between 0 and 1, both excluded.
        seed: an integer, at least 0.

    Returns:
        (training documents, validation documents), both with some text.

    Raises:
        TypeError: an element of `documents` is not a Document.
        ValueError: the fraction or the seed is out of range, there is no document, or there is too little text for
            both parts.

    Example:
        >>> documents = [Document(str(i), b"text") for i in range(10)]
        >>> train, validation = split_documents(documents, 0.2, seed=0)
        >>> len(train), len(validation)
        (8, 2)
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
    target = validation_fraction * _size(documents)
    train, validation = _split_whole_documents(documents, target, seed)
    if not target / 2 <= _size(validation) <= 2 * target or not _size(train):
        train, validation = _split_tail(documents, target)
    if not _size(train) or not _size(validation):
        raise ValueError(
            f"cannot hold out {validation_fraction:g} of {_size(documents)} bytes: one of the parts would be empty"
        )
    return train, validation


def _size(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)


def _split_whole_documents(
    documents: list[Document], target: float, seed: int
) -> tuple[list[Document], list[Document]]:
    chosen: set[int] = set()
    size = 0
    for index in np.random.default_rng(seed).permutation(len(documents)).tolist():
        length = len(documents[index].text)
        # Choose it only if that brings the held-out size closer to the target.
        if length < 2 * (target - size):
            chosen.add(index)
            size += length
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [document for index, document in enumerate(documents) if index in chosen]


def _split_tail(documents: list[Document], target: float) -> tuple[list[Document], list[Document]]:
    first = len(documents) - 1
    missing = target - len(documents[first].text)  # if negative, the bytes of this document that stay in training
    while first and missing > 0:
        first -= 1
        missing -= len(documents[first].text)
    name, text = documents[first]
    cut = _cut_position(text, round(-missing))
    head, tail = text[:cut], text[cut:]
    if not head:
        return documents[:first], documents[first:]
    if not tail:
        return documents[: first + 1], documents[first + 1 :]
    train = [*documents[:first], Document(f"{name} (head)", head)]
    return train, [Document(f"{name} (tail)", tail), *documents[first + 1 :]]


def _cut_position(text: bytes, near: int) -> int:
    """Return where to cut: after the last line end before `near`, else between two characters at or before `near`."""
    line = text.rfind(b"\n", 0, near) + 1
    # A distant line end would move much text into the held-out part: accept it within a tenth of that part only.
    if line and near - line <= (len(text) - near) / 10:
        return line
    while 0 < near < len(text) and text[near] & 0xC0 == 0x80:  # inside a UTF-8 character
        near -= 1
    return near
