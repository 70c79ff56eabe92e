"""Bytes as tokens: 256 ids. Byte 0 does not occur in text, so id 0 marks the start of a document."""

import codecs
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Int32


def checked_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> Int[np.ndarray, " n"]:
    """Return token ids as an array. Raises TypeError for non-integers, ValueError outside 0..vocab_size - 1."""
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1:
        raise ValueError(f"token ids must be one sequence, shape [n]; got shape {list(array.shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"token ids must be integers; got dtype {array.dtype}")
    outside = np.flatnonzero((array < 0) | (array >= vocab_size))
    if outside.size:
        position = int(outside[0])
        raise ValueError(f"token ids must be in 0..{vocab_size - 1}; got {int(array[position])} at position {position}")
    return array


def checked_text(text: str) -> str:
    """Return `text`. Raises TypeError if it is not a str, ValueError for an unpaired surrogate (no UTF-8 form)."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str; got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text must be valid Unicode; unpaired surrogate at character {error.start}") from error
    return text


def _checked_bytes(ids: Iterable[int] | np.ndarray) -> bytes:
    """Return token ids as bytes without start tokens. Raises as `checked_ids`."""
    array = checked_ids(ids, ByteTokenizer.vocab_size)
    return bytes(array[array != ByteTokenizer.bos_id].tolist())


class ByteTokenizer:
    """UTF-8 bytes as token ids, with nothing to train and nothing to load. A `Tokenizer`.

    Attributes:
        name: "bytes".
        fingerprint: "bytes".
        vocab_size: 256.
        bos_id: 0, the token before each document.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("hé", bos=True).tolist()
        [0, 104, 195, 169]
        >>> tokenizer.decode([0, 104, 195, 169])
        'hé'
        >>> decoder = tokenizer.stream_decoder()
        >>> [decoder.push(token) for token in (104, 195, 169)]
        ['h', '', 'é']
    """

    name: ClassVar[str] = "bytes"
    fingerprint: ClassVar[str] = "bytes"
    vocab_size: ClassVar[int] = 256
    bos_id: ClassVar[int] = 0

    def encode(self, text: str, *, bos: bool = False) -> Int32[np.ndarray, " n"]:
        r"""Return the UTF-8 bytes of a text as token ids.

        Args:
            text: the text, without "\0": that byte is the start token.
            bos: put the start token first.

        Returns:
            int32 ids [n].

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` holds "\0" or an unpaired surrogate, which has no UTF-8 form.
        """
        data = checked_text(text).encode("utf-8")
        if "\0" in text:
            raise ValueError(f"text must not hold the NUL character; found at character {text.index(chr(0))}")
        return np.frombuffer(b"\0" + data if bos else data, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of token ids.

        Args:
            ids: integers [n] in 0..255.

        Returns:
            The text without start tokens. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            TypeError: an id is not an integer.
            ValueError: an id is outside 0..255.
        """
        return _checked_bytes(ids).decode("utf-8", errors="replace")

    def stream_decoder(self, context: Iterable[int] | np.ndarray = ()) -> "StreamDecoder":
        """Return a new decoder for ids that arrive a few at a time. `context` does not affect bytes and is ignored."""
        return StreamDecoder()


class StreamDecoder:
    """Decodes bytes as they are sampled. A character appears when its last byte has arrived, never half of it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """Return the text completed by one or several ids, "" inside a character. Raises as `ByteTokenizer.decode`."""
        if isinstance(ids, int | np.integer):
            ids = [int(ids)]
        elif isinstance(ids, np.ndarray) and ids.ndim == 0:
            ids = ids[None]
        return self._decoder.decode(_checked_bytes(ids))

    def finish(self) -> str:
        """End the text: return U+FFFD if a character is incomplete, else "". The decoder can then be reused."""
        pending = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return pending
