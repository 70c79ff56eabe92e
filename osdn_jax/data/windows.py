"""Documents laid end to end and cut into windows of equal length."""

import operator
from collections.abc import Iterable
from typing import Protocol, SupportsIndex, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32

from osdn_jax.data.documents import Document


class Window(TypedDict):
    """One window, shape [T], or a batch of them, shape [B, T].

    inputs:      token ids.
    targets:     the token after each input.
    segment_ids: 1 at the start of the window and one more at each document start; 0 where there is padding.
    weights:     1 where the target is text; 0 where it is the start token of the next document, or padding.
    """

    inputs: Int32[np.ndarray, "... T"]
    targets: Int32[np.ndarray, "... T"]
    segment_ids: Int32[np.ndarray, "... T"]
    weights: Float32[np.ndarray, "... T"]


@runtime_checkable
class WindowSource(Protocol):
    """What batches are made from: windows of one shape by index. `PackedWindows` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Window: ...


def checked_count(name: str, value: SupportsIndex) -> int:
    """`value` as an int that is at least 1. Raises TypeError if it is no integer, ValueError if it is below 1."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer; got {value!r} ({type(value).__name__})") from error
    if count < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")
    return count


def checked_position(index: SupportsIndex, count: int) -> int:
    """`index` of one of `count` windows, from the end if negative, as 0..count - 1. Raises IndexError outside."""
    position = operator.index(index)
    if not -count <= position < count:
        raise IndexError(f"window {position} of {count}")
    return position % count


def window_count(tokens: int, length: int) -> int:
    """How many windows a stream of tokens has: one for each `length` targets or part of it."""
    return (tokens - 2) // length + 1  # the first token is no target


def cut_window(tokens: Int[np.ndarray, " n"], length: int, start_id: int) -> Window:
    """The window of the first n - 1 tokens and those one later, padded to `length`; 2 ≤ n ≤ length + 1.

    start_id is the token before each document.
    """
    tokens = tokens.astype(np.int32)
    inputs, targets = tokens[:-1], tokens[1:]
    starts = inputs == start_id
    # The first position belongs to segment 1 whether a document starts there or goes on there.
    segment_ids = np.cumsum(starts, dtype=np.int32) + np.int32(not starts[0])
    padding = (0, length - len(inputs))
    return {
        "inputs": np.pad(inputs, padding),
        "targets": np.pad(targets, padding),
        "segment_ids": np.pad(segment_ids, padding),
        "weights": np.pad((targets != start_id).astype(np.float32), padding),
    }


def _stream(documents: Iterable[Document]) -> bytes:
    parts = []
    for document in documents:
        if not isinstance(document, Document):
            raise TypeError(f"documents must be Document(name, text); got {type(document).__name__}")
        if not isinstance(document.text, bytes):
            raise TypeError(f"text of document {document.name!r} must be bytes; got {type(document.text).__name__}")
        if (at := document.text.find(b"\0")) >= 0:
            raise ValueError(f"document {document.name!r} holds byte 0, the start token, at offset {at}")
        parts.append(b"\0" + document.text)
    return b"".join(parts)


class PackedWindows:
    """Windows over the stream `0 text 0 text ...` of the documents in order: a random access source for grain.

    Window i has the inputs at stream positions [i T, i T + T) and the targets one position later, so windows share no
    input, and over all windows every byte of every document is a target of weight 1 exactly once. The last window is
    padded. Use `segment_ids` to keep the memory of one document out of the next; a document that crosses into a new
    window loses what it had before. `text_bytes` is the bytes of text in all, the sum of `weights` over all windows.

    Raises TypeError for what is not a Document of bytes or a sequence length that is no integer; ValueError for a
    sequence length below 1, documents without a single byte, or text with byte 0.
    """

    def __init__(self, documents: Iterable[Document], sequence_length: int) -> None:
        self.sequence_length = checked_count("sequence length", sequence_length)
        # One byte per token; windows widen to int32 as they are read.
        self._tokens = np.frombuffer(_stream(documents), np.uint8)
        self.text_bytes = int(np.count_nonzero(self._tokens))
        if not self.text_bytes:
            raise ValueError("the documents hold no text: at least one byte is needed")

    @property
    def text_tokens(self) -> int:
        """The number of targets of weight 1: here a token is a byte."""
        return self.text_bytes

    def __len__(self) -> int:
        """The number of windows, ≥ 1."""
        return window_count(len(self._tokens), self.sequence_length)

    def __getitem__(self, index: SupportsIndex) -> Window:
        """Window `index`; from the end if negative. Raises IndexError outside the source."""
        length = self.sequence_length
        start = checked_position(index, len(self)) * length
        return cut_window(self._tokens[start : start + length + 1], length, start_id=0)

    def __repr__(self) -> str:
        return f"PackedWindows({len(self)} windows of {self.sequence_length}, {self.text_bytes} bytes of text)"
