"""Tokenizers: a Hugging Face `tokenizer.json`, a SentencePiece `.model`, or bytes. No code of a file is executed."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from osdn_jax._optional import require
from osdn_jax.data.byte_tokenizer import ByteTokenizer, checked_ids, checked_text
from osdn_jax.data.documents import Document
from osdn_jax.data.token_decoder import TokenDecoder, find_byte_tokens

BYTES = "bytes"  # selects the tokenizer that needs no file

_MAX_FILE_BYTES = 1 << 29
# Start tokens to look for if there is no tokenizer_config.json. An end-of-document token can start documents too.
_START_NAMES = ("<s>", "<bos>", "[BOS]", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>")
_END_NAMES = ("</s>", "<eos>", "[EOS]", "<|eos|>", "<|end_of_text|>", "<|endoftext|>")


class Decoder(Protocol):
    """Turns ids that arrive a few at a time into text. `StreamDecoder` and `TokenDecoder` are decoders."""

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """Return the text that these ids complete."""
        ...

    def finish(self) -> str:
        """Return the text that was held back."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Converts text to token ids and back; `load_tokenizer` returns one.

    Attributes:
        name: "bytes" or the file, for messages.
        fingerprint: tells tokenizers apart: "bytes" or the SHA-256 of the file in hexadecimal.
        vocab_size: the largest id plus 1.
        bos_id: the token before every document; it occurs nowhere else.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    def encode(self, text: str, *, bos: bool = False) -> Int32[np.ndarray, " n"]:
        """Return the ids of the text, after the start token if `bos`."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of ids [n], without start tokens."""
        ...

    def stream_decoder(self, context: Iterable[int] | np.ndarray = ()) -> Decoder:
        """Return a decoder for ids that follow those of `context`, whose text is not repeated."""
        ...


def load_tokenizer(path: str | os.PathLike[str] = BYTES) -> Tokenizer:
    """Load a Hugging Face `tokenizer.json` or a SentencePiece `.model`, or return the `ByteTokenizer`.

    Text becomes ids of ordinary tokens only: the name of a special token in a text is encoded as text. Truncation and
    padding settings of a `tokenizer.json` are ignored.

    The start token of documents, `bos_id`, is the tokenizer's own. A `.model` gives its beginning of sentence, or else
    its end of sentence. A `tokenizer.json` gives the `bos_token`, or else the `eos_token`, named in a
    `tokenizer_config.json` in the same folder; without that file, a special token with one of the usual names.

    Args:
        path: "bytes" (default), a file that ends in `.json` or `.model`, or a folder with a `tokenizer.json` or a
            `tokenizer.model`.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: `path` does not exist.
        ImportError: `tokenizers` or `sentencepiece` is missing; the message has the line that installs it.
        TypeError: `path` is neither a str nor a path.
        ValueError: another ending, a damaged file or a tokenizer without a start token; the message names the file.

    Example:
        >>> tokenizer = load_tokenizer("bytes")
        >>> tokenizer.vocab_size, tokenizer.encode("to be").tolist()
        (256, [116, 111, 32, 98, 101])
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"tokenizer must be {BYTES!r} or a path; got {type(path).__name__}")
    if path == BYTES:
        return ByteTokenizer()
    if not os.fspath(path):
        raise ValueError(f"tokenizer must not be empty; expected {BYTES!r}, a tokenizer.json or a .model file")
    file = Path(path)
    if file.is_dir():
        found = [file / name for name in ("tokenizer.json", "tokenizer.model") if (file / name).is_file()]
        if not found:
            raise ValueError(f"folder {file} holds no tokenizer.json and no tokenizer.model")
        file = found[0]
    if not file.is_file():
        raise FileNotFoundError(f"no such tokenizer: {file}; expected {BYTES!r}, a tokenizer.json or a .model file")
    match file.suffix.lower():
        case ".json":
            return HuggingFaceTokenizer(file)
        case ".model":
            return SentencePieceTokenizer(file)
    raise ValueError(f"unknown tokenizer file {file}; expected one ending in .json (Hugging Face) or .model")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest little-endian unsigned integer type that holds the ids of a vocabulary."""
    return np.dtype(np.min_scalar_type(vocab_size - 1)).newbyteorder("<")


def encode_document(document: Document, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """Return the ids of a document in their smallest dtype. Raises ValueError, naming it, if it cannot be encoded."""
    try:
        ids = tokenizer.encode(document.text.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"document {document.name!r}: {error}") from error
    return ids.astype(token_dtype(tokenizer.vocab_size))


class _FileTokenizer:
    """A tokenizer from a file. Subclasses implement `_encode`, `_decode` and `_id_of` with their library."""

    def __init__(self, file: Path, data: bytes) -> None:
        self.name = str(file)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size = 0
        self.bos_id = 0
        self._skipped: frozenset[int] = frozenset()  # ids that the library drops before it joins byte tokens

    def _encode(self, text: str) -> Sequence[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _id_of(self, token: str) -> int | None:
        raise NotImplementedError

    def encode(self, text: str, *, bos: bool = False) -> Int32[np.ndarray, " n"]:
        """Return the token ids of a text.

        Args:
            text: the text.
            bos: put the start token first.

        Returns:
            int32 ids [n].

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` holds an unpaired surrogate, or the tokenizer encodes part of it as its start token.
        """
        ids = np.asarray(self._encode(checked_text(text)), np.int32)
        if (positions := np.flatnonzero(ids == self.bos_id)).size:
            raise ValueError(f"{self.name} makes token {int(positions[0])} of the text its start token, {self.bos_id}")
        return np.concatenate([np.full(1, self.bos_id, np.int32), ids]) if bos else ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Return the text of token ids.

        Args:
            ids: integers [n] in 0..vocab_size - 1.

        Returns:
            The text without special tokens.

        Raises:
            TypeError: an id is not an integer.
            ValueError: an id is outside the vocabulary.
        """
        return self._decode(checked_ids(ids, self.vocab_size).tolist())

    def stream_decoder(self, context: Iterable[int] | np.ndarray = ()) -> TokenDecoder:
        """Return a decoder for ids that follow those of `context`, whose text is not repeated."""
        bytes_of_ids = find_byte_tokens(self._id_of, self._decode)
        return TokenDecoder(self.decode, context, byte_tokens=bytes_of_ids, skipped=self._skipped)


class HuggingFaceTokenizer(_FileTokenizer):
    """A `tokenizer.json`, read by the library `tokenizers`. `load_tokenizer` documents arguments and errors."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        library = require("tokenizers", "tokenizers", "a tokenizer.json")
        file = Path(file)
        data = _read(file)
        super().__init__(file, data)
        try:
            text = data.decode("utf-8")
            json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        try:
            tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no more specific class
            raise ValueError(f"{file} is not a Hugging Face tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # encodes their names in a text as ordinary text
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError(f"{file} has no tokens")
        self.vocab_size = max(ids.values()) + 1
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self.bos_id = _start_token(file, ids, special)
        unused = set(range(self.vocab_size)).difference(ids.values())
        self._skipped = frozenset(ids[token] for token in special) | unused

    def _encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _id_of(self, token: str) -> int | None:
        token_id = self._tokenizer.token_to_id(token)
        return None if token_id in self._skipped else token_id


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece model, read by the library `sentencepiece`. `load_tokenizer` documents arguments and errors."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        library = require("sentencepiece", "tokenizers", "a SentencePiece model")
        file = Path(file)
        data = _read(file)
        super().__init__(file, data)
        try:
            self._processor = library.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{file} is not a SentencePiece model: {error}") from error
        self.vocab_size = self._processor.get_piece_size()
        starts = [i for i in (self._processor.bos_id(), self._processor.eos_id()) if i >= 0]
        if not starts:
            raise ValueError(f"{file} has no start token: neither a beginning nor an end of sentence")
        self.bos_id = starts[0]

    def _encode(self, text: str) -> Sequence[int]:
        return self._processor.encode(text)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _id_of(self, token: str) -> int | None:
        token_id = self._processor.piece_to_id(token)
        return token_id if self._processor.is_byte(token_id) else None


def _read(file: Path) -> bytes:
    if (size := file.stat().st_size) > _MAX_FILE_BYTES:
        raise ValueError(f"{file} has {size:,} bytes; a tokenizer has at most {_MAX_FILE_BYTES:,}")
    if not size:
        raise ValueError(f"{file} is empty")
    return file.read_bytes()


def _start_token(file: Path, ids: dict[str, int], special: list[str]) -> int:
    """Return the id of the token that starts documents. Raises ValueError if none is known."""
    settings = file.with_name("tokenizer_config.json")
    if settings.is_file():
        for token in _named_tokens(settings):
            if token not in ids:
                raise ValueError(f"{settings} names the token {token!r}, which {file} does not have")
            return ids[token]
    else:
        for token in (*_START_NAMES, *_END_NAMES):
            if token in special:
                return ids[token]
    raise ValueError(
        f"{file} has no start token; name it in {settings}, as in "
        '{"bos_token": "<s>"}; special tokens: ' + (", ".join(map(repr, special)) or "none")
    )


def _named_tokens(settings: Path) -> Iterator[str]:
    """Yield the names of the start and the end token that a tokenizer_config.json sets."""
    try:
        values: Any = json.loads(_read(settings).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{settings} is not JSON: {error}") from error
    for key in ("bos_token", "eos_token"):
        token = values.get(key) if isinstance(values, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield token
