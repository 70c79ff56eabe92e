"""Documents as one stream of tokens, packed into windows of equal length."""

import operator
from collections.abc import Iterable
from typing import Protocol, SupportsIndex, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int32

from osdn_jax.data.documents import Document
from osdn_jax.data.tokenizers import Tokenizer, encode_document, token_dtype


class Window(TypedDict):
    """A window, shape [T], or a batch of windows, shape [B, T].

    Attributes:
        inputs: token ids.
        targets: the token after each input.
        segment_ids: 1 at the start of the window and 1 more at each document start; 0 for padding.
        weights: 1 if the target is text; 0 if it is the start token of the next document, or padding.
    """

    inputs: Int32[np.ndarray, "... T"]
    targets: Int32[np.ndarray, "... T"]
    segment_ids: Int32[np.ndarray, "... T"]
    weights: Float32[np.ndarray, "... T"]


@runtime_checkable
class WindowSource(Protocol):
    """Windows of one shape, read by index, that batches are made from. `TokenWindows` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Window: ...


@runtime_checkable
class TokenStream(Protocol):
    """Token ids `start-token document start-token document ...`, read by position.

    Attributes:
        on_disk: True if reading accesses files, so that reading ahead pays.
        start_id: the token before each document.
        text_tokens: the number of tokens of all documents, without start tokens.
        text_bytes: the bytes of text that these tokens stand for.
    """

    on_disk: bool

    start_id: int
    text_tokens: int
    text_bytes: int

    def __len__(self) -> int:
        """Return the number of tokens, start tokens included."""
        ...

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Return the tokens at positions start to stop - 1, fewer at the end."""
        ...


def checked_count(name: str, value: SupportsIndex) -> int:
    """Return `value` as an int. Raises TypeError if it is not an integer, ValueError if it is below 1."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer; got {value!r} ({type(value).__name__})") from error
    if count < 1:
        raise ValueError(f"{name} must be at least 1; got {count}")
    return count


def cut_window(tokens: Int[np.ndarray, " n"], length: int, start_id: int) -> Window:
    """Make the window whose inputs are the first n - 1 tokens and whose targets are the last n - 1, padded to `length`.

    n is from 2 to length + 1, and `start_id` is the token before each document.
    """
    tokens = tokens.astype(np.int32)
    inputs, targets = tokens[:-1], tokens[1:]
    starts = inputs == start_id
    # The first position has segment id 1, whether or not a document starts there.
    segment_ids = np.cumsum(starts, dtype=np.int32) + np.int32(not starts[0])
    padding = (0, length - len(inputs))
    return {
        "inputs": np.pad(inputs, padding),
        "targets": np.pad(targets, padding),
        "segment_ids": np.pad(segment_ids, padding),
        "weights": np.pad((targets != start_id).astype(np.float32), padding),
    }


class _TokensInMemory:
    """A `TokenStream` over an array."""

    on_disk = False

    def __init__(self, tokens: Int[np.ndarray, " n"], *, start_id: int, text_tokens: int, text_bytes: int) -> None:
        self._tokens = tokens
        self.start_id, self.text_tokens, self.text_bytes = start_id, text_tokens, text_bytes

    def __len__(self) -> int:
        """Return the number of tokens, start tokens included."""
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Return the tokens at positions start to stop - 1, fewer at the end."""
        return self._tokens[start:stop]


class ByteDocuments(_TokensInMemory):
    """Documents in memory as byte tokens, a `TokenStream`: byte 0, the first document's bytes, byte 0, ...

    This is `TokenizedDocuments` with a `ByteTokenizer`, but needs one byte of memory per token while it is built, and
    accepts bytes that are not UTF-8.

    Args:
        documents: the text.

    Raises:
        TypeError: an element of `documents` is not a Document of bytes.
        ValueError: a text holds byte 0, or the documents have no text.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        parts = []
        for document in documents:
            if not isinstance(document, Document):
                raise TypeError(f"documents must be Document(name, text); got {type(document).__name__}")
            if not isinstance(document.text, bytes):
                raise TypeError(f"text of document {document.name!r} must be bytes; got {type(document.text).__name__}")
            if (position := document.text.find(b"\0")) >= 0:
                raise ValueError(f"document {document.name!r} holds byte 0, the start token, at offset {position}")
            parts.append(b"\0" + document.text)
        # One byte per token; windows widen to int32 as they are read.
        tokens = np.frombuffer(b"".join(parts), np.uint8)
        text_bytes = len(tokens) - len(parts)
        if not text_bytes:
            raise ValueError("the documents hold no text: at least one byte is needed")
        super().__init__(tokens, start_id=0, text_tokens=text_bytes, text_bytes=text_bytes)


class TokenizedDocuments(_TokensInMemory):
    """Documents tokenised into memory, a `TokenStream`.

    Args:
        documents: the text.
        tokenizer: as `load_tokenizer` returns it.

    Raises:
        ValueError: a document cannot be encoded (the message names it), or the documents have no tokens.
    """

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        start = np.full(1, tokenizer.bos_id, token_dtype(tokenizer.vocab_size))
        parts = []
        text_tokens = text_bytes = 0
        for document in documents:
            ids = encode_document(document, tokenizer)
            parts += [start, ids]
            text_tokens += len(ids)
            text_bytes += len(document.text)
        if not text_tokens:
            raise ValueError("the documents hold no text: at least one token is needed")
        super().__init__(
            np.concatenate(parts), start_id=tokenizer.bos_id, text_tokens=text_tokens, text_bytes=text_bytes
        )


class TokenWindows:
    """Windows over a token stream, a random-access source for `training_batches` and `validation_batches`.

    Window i has the inputs at stream positions [i T, i T + T) and the targets one position later, so windows share no
    input. Over all windows every token of every document is a target of weight 1 exactly once; start tokens are
    targets of weight 0. The last window is padded. `segment_ids` separate the documents of a window: pass them to the
    model so that no state crosses from one document to the next. A document that crosses into the next window loses
    its earlier tokens there.

    Args:
        stream: `TokenizedDocuments`, `ByteDocuments` or `PreparedTokens`.
        sequence_length: T, at least 1.

    Attributes:
        sequence_length: T.
        text_tokens: the number of targets of weight 1 over all windows.
        text_bytes: the bytes of text that these tokens stand for.
        on_disk: True if reading a window accesses files.

    Raises:
        TypeError: `sequence_length` is not an integer.
        ValueError: `sequence_length` is below 1.

    Example:
        >>> from osdn_jax.data import ByteTokenizer
        >>> stream = TokenizedDocuments([Document("a", b"ab"), Document("b", b"c")], ByteTokenizer())
        >>> windows = TokenWindows(stream, 3)
        >>> len(windows), windows.text_tokens
        (2, 3)
        >>> {name: array.tolist() for name, array in windows[0].items()}
        {'inputs': [0, 97, 98], 'targets': [97, 98, 0], 'segment_ids': [1, 1, 1], 'weights': [1.0, 1.0, 0.0]}
    """

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.sequence_length = checked_count("sequence length", sequence_length)
        self.text_tokens, self.text_bytes = stream.text_tokens, stream.text_bytes
        self.on_disk = stream.on_disk
        self._stream = stream

    def __len__(self) -> int:
        """Return the number of windows, at least 1: one per T targets, the last one padded."""
        return (len(self._stream) - 2) // self.sequence_length + 1  # the stream's first token is not a target

    def __getitem__(self, index: SupportsIndex) -> Window:
        """Return window `index`, counted from the end if negative. Raises IndexError outside the source."""
        position, count = operator.index(index), len(self)
        if not -count <= position < count:
            raise IndexError(f"window {position} of {count}")
        start = position % count * self.sequence_length
        tokens = self._stream.read(start, start + self.sequence_length + 1)
        return cut_window(tokens, self.sequence_length, self._stream.start_id)

    def __repr__(self) -> str:
        return f"TokenWindows({len(self)} windows of {self.sequence_length}, {self.text_tokens} tokens of text)"


class PackedWindows(TokenWindows):
    """Windows over the bytes of documents: `TokenWindows(ByteDocuments(documents), sequence_length)`.

    Args:
        documents: the text.
        sequence_length: T, at least 1.

    Raises:
        TypeError: an element of `documents` is not a Document of bytes, or `sequence_length` is not an integer.
        ValueError: `sequence_length` is below 1, a text holds byte 0, or the documents have no text.

    Example:
        >>> windows = PackedWindows([Document("a", b"some text"), Document("b", b"and more")], 4)
        >>> windows
        PackedWindows(5 windows of 4, 17 bytes of text)
        >>> windows[2]["segment_ids"].tolist()
        [1, 1, 2, 2]
    """

    def __init__(self, documents: Iterable[Document], sequence_length: int) -> None:
        checked_count("sequence length", sequence_length)  # before the text is copied
        super().__init__(ByteDocuments(documents), sequence_length)

    def __repr__(self) -> str:
        return f"PackedWindows({len(self)} windows of {self.sequence_length}, {self.text_bytes} bytes of text)"
