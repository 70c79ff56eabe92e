"""Tokens are bytes: 256 ids, of which 0 starts a document because byte 0 does not occur in text."""

import codecs
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Int32


def checked_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> Int[np.ndarray, " n"]:
    """Token ids as an array. TypeError for non-integers, ValueError outside 0..vocab_size - 1."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1:
        raise ValueError(f"token ids must be one sequence, shape [n]; got shape {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"token ids must be integers; got dtype {array.dtype}")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise ValueError(f"token ids must be in 0..{vocab_size - 1}; got {int(array[at])} at position {at}")
    return array


def checked_text(text: str) -> str:
    """`text` if it has a UTF-8 form. TypeError if it is not a str, ValueError for an unpaired surrogate."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str; got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be valid Unicode; unpaired surrogate at character {error.start}") from error
    return text


def _checked_bytes(ids: Iterable[int] | np.ndarray) -> bytes:
    """Token ids as bytes, start tokens left out. Raises as `checked_ids`."""
    array = checked_ids(ids, ByteTokenizer.vocab_size)
    return bytes(array[array != ByteTokenizer.bos_id].tolist())


class ByteTokenizer:
    """UTF-8 bytes as token ids; there is nothing to train and nothing to load."""

    name: ClassVar[str] = "bytes"
    fingerprint: ClassVar[str] = "bytes"
    vocab_size: ClassVar[int] = 256
    bos_id: ClassVar[int] = 0

    def encode(self, text: str, *, bos: bool = False) -> Int32[np.ndarray, " n"]:
        """Ids of the UTF-8 bytes of `text`, after the start token if `bos`.

        Raises TypeError if `text` is not a str, and ValueError if it holds "\\0" (that byte is the start token) or
        an unpaired surrogate (it has no UTF-8 form).
        """
        data = checked_text(text).encode("utf-8")
        if "\0" in text:
            raise ValueError(f"text must not hold the NUL character; found at character {text.index(chr(0))}")
        return np.frombuffer(b"\0" + data if bos else data, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids` [n]. Start tokens are left out; what is not UTF-8 becomes U+FFFD.

        Raises TypeError for ids that are not integers and ValueError for ids outside 0..255.
        """
        return _checked_bytes(ids).decode("utf-8", errors="replace")

    def stream_decoder(self, context: Iterable[int] | np.ndarray = ()) -> "StreamDecoder":
        """A fresh decoder for ids that arrive a few at a time; to bytes, what came before does not matter."""
        return StreamDecoder()


class StreamDecoder:
    """Decodes ids as they are sampled; a character appears once its last byte has come, never half of it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """The text completed by one id or several; "" while a character is incomplete. Raises as `decode` does."""
        if isinstance(ids, int | np.integer):
            ids = [int(ids)]
        elif isinstance(ids, np.ndarray) and ids.ndim == 0:
            ids = ids[None]
        return self._decoder.decode(_checked_bytes(ids))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character was cut short, else "". The decoder can then be reused."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
