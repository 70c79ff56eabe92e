"""Windows over documents as tokens of any tokenizer, in memory or in shards on disk."""

from collections.abc import Iterable
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int

from osdn_jax.data.documents import Document
from osdn_jax.data.tokenizers import Tokenizer
from osdn_jax.data.windows import Window, checked_count, checked_position, cut_window, window_count


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


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integers, little endian, that hold the ids of a vocabulary."""
    return np.dtype(np.min_scalar_type(vocab_size - 1)).newbyteorder("<")


def encode_document(document: Document, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """Token ids of a document, in the smallest dtype. Raises ValueError, naming it, for what cannot be encoded."""
    try:
        ids = tokenizer.encode(document.text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"document {document.name!r}: {error}") from error
    return ids.astype(token_dtype(tokenizer.vocab_size))


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
