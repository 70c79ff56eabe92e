"""Documents laid end to end and cut into windows of equal length."""

import operator
from collections.abc import Iterable
from typing import Protocol, SupportsIndex, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32

from osdn_jax.data.documents import Document
from osdn_jax.data.tokenizers import Tokenizer, encode_document, token_dtype


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


@runtime_checkable
class TokenStream(Protocol):
    """`start-token document start-token document ...` as token ids, read by position.

    start_id: the token before each document.
    text_tokens, text_bytes: how many tokens the documents have, and the bytes of the text that they stand for.
    on_disk: whether reading takes files, so that it pays to read ahead.
    """

    on_disk: bool

    start_id: int
    text_tokens: int
    text_bytes: int

    def __len__(self) -> int:
        """Tokens in all, start tokens included."""
        ...

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """The tokens at positions start to stop - 1, or to the end."""
        ...


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


class ByteDocuments:
    """The bytes of documents in memory, each document after byte 0: a `TokenStream` that no tokenizer is needed for.

    Raises TypeError for what is not a Document of bytes; ValueError for documents without a single byte, or text with
    byte 0.
    """

    on_disk = False
    start_id = 0

    def __init__(self, documents: Iterable[Document]) -> None:
        parts = []
        for document in documents:
            if not isinstance(document, Document):
                raise TypeError(f"documents must be Document(name, text); got {type(document).__name__}")
            if not isinstance(document.text, bytes):
                raise TypeError(f"text of document {document.name!r} must be bytes; got {type(document.text).__name__}")
            if (at := document.text.find(b"\0")) >= 0:
                raise ValueError(f"document {document.name!r} holds byte 0, the start token, at offset {at}")
            parts.append(b"\0" + document.text)
        # One byte per token; windows widen to int32 as they are read.
        self._tokens = np.frombuffer(b"".join(parts), np.uint8)
        self.text_tokens = self.text_bytes = len(self._tokens) - len(parts)
        if not self.text_bytes:
            raise ValueError("the documents hold no text: at least one byte is needed")

    def __len__(self) -> int:
        """Tokens in all, start tokens included."""
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """The tokens at positions start to stop - 1, or to the end."""
        return self._tokens[start:stop]


class TokenizedDocuments:
    """Documents tokenised into memory: a `TokenStream`. Raises ValueError for documents without any token."""

    on_disk = False

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        self.start_id = tokenizer.bos_id
        self.text_tokens = self.text_bytes = 0
        start = np.full(1, tokenizer.bos_id, token_dtype(tokenizer.vocab_size))
        parts = []
        for document in documents:
            ids = encode_document(document, tokenizer)
            parts += [start, ids]
            self.text_tokens += len(ids)
            self.text_bytes += len(document.text)
        if not self.text_tokens:
            raise ValueError("the documents hold no text: at least one token is needed")
        self._tokens = np.concatenate(parts)

    def __len__(self) -> int:
        """Tokens in all, start tokens included."""
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """The tokens at positions start to stop - 1, or to the end."""
        return self._tokens[start:stop]


class TokenWindows:
    """Windows over a token stream, cut as `PackedWindows` cuts bytes: a random access source for grain.

    Every token of every document is a target of weight 1 exactly once over all windows; the start tokens are targets
    of weight 0. `text_tokens` is the sum of `weights`, and `text_bytes` the bytes of text that they stand for.

    Raises TypeError for a sequence length that is no integer, ValueError for one below 1.
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.sequence_length = checked_count("sequence length", sequence_length)
        self.text_tokens, self.text_bytes = stream.text_tokens, stream.text_bytes
        self.on_disk = stream.on_disk
        self._stream = stream

    def __len__(self) -> int:
        """The number of windows, ≥ 1."""
        return window_count(len(self._stream), self.sequence_length)

    def __getitem__(self, index: SupportsIndex) -> Window:
        """Window `index`; from the end if negative. Raises IndexError outside the source."""
        start = checked_position(index, len(self)) * self.sequence_length
        tokens = self._stream.read(start, start + self.sequence_length + 1)
        return cut_window(tokens, self.sequence_length, self._stream.start_id)

    def __repr__(self) -> str:
        return f"TokenWindows({len(self)} windows of {self.sequence_length}, {self.text_tokens} tokens of text)"


class PackedWindows(TokenWindows):
    """The bytes of documents as windows: `TokenWindows(ByteDocuments(documents), sequence_length)`.

    Raises TypeError for what is not a Document of bytes or a sequence length that is no integer; ValueError for a
    sequence length below 1, documents without a single byte, or text with byte 0.
    """

    def __init__(self, documents: Iterable[Document], sequence_length: int) -> None:
        checked_count("sequence length", sequence_length)
        super().__init__(ByteDocuments(documents), sequence_length)

    def __repr__(self) -> str:
        return f"PackedWindows({len(self)} windows of {self.sequence_length}, {self.text_bytes} bytes of text)"
