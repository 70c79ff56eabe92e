"""A document: the unit of text that a model reads from its start token to its end."""

from typing import NamedTuple


class Document(NamedTuple):
    """One piece of text.

    name: where it came from, for messages and tables ("macbeth", "notes/a.txt", "rows.jsonl:12").
    text: UTF-8 bytes without byte 0, which is the start token of a document (see `ByteTokenizer`).
    """

    name: str
    text: bytes
