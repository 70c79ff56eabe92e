"""Tokenizers from files: a Hugging Face `tokenizer.json`, a SentencePiece `.model`; or bytes. No code is loaded."""

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
from osdn_jax.data.token_decoder import TokenDecoder, byte_tokens

BYTES = "bytes"  # the name of the tokenizer without a file

_LARGEST_FILE = 1 << 29
# Names of the start token where no tokenizer_config.json says which it is; the end of a document serves as well.
_START_NAMES = ("<s>", "<bos>", "[BOS]", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>")
_END_NAMES = ("</s>", "<eos>", "[EOS]", "<|eos|>", "<|end_of_text|>", "<|endoftext|>")


class Decoder(Protocol):
    """Turns ids that arrive a few at a time into text; `StreamDecoder` is one."""

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """The text that is complete with these ids."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back.

    name: for messages: "bytes" or the file.
    fingerprint: what tells two tokenizers apart: "bytes" or the SHA-256 of the file, in hexadecimal.
    vocab_size: one more than the largest id.
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
        """Ids of the text, after the start token if `bos`."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of ids [n]; start tokens are left out."""
        ...

    def stream_decoder(self, context: Iterable[int] | np.ndarray = ()) -> Decoder:
        """A decoder of ids that come after those of `context`, whose text is not repeated."""
        ...


def load_tokenizer(path: str | os.PathLike[str] = BYTES) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` (Hugging Face), a `.model` (SentencePiece) or a folder with one; or "bytes".

    Text becomes the ids of ordinary tokens only: the name of a special token in a text is text, and truncation or
    padding that a tokenizer.json asks for is left out. The start token is the tokenizer's own: for a `.model` its
    beginning of sentence, else its end of sentence; for a `tokenizer.json` what `bos_token`, else `eos_token`, of a
    tokenizer_config.json beside it names, and without such a file a special token with one of the usual names.

    Raises FileNotFoundError for no such file; ImportError, with the line that installs it, where the library is
    missing; ValueError, naming the file, for another ending, a damaged file or a tokenizer without a start token;
    TypeError for what is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"tokenizer must be {BYTES!r} or a path; got {type(path).__name__}")
    if path == BYTES:
        return ByteTokenizer()
    if not os.fspath(path):
        raise ValueError(f"tokenizer must not be empty; expected {BYTES!r}, a tokenizer.json or a .model file")
    file = Path(path)
    if file.is_dir():
        inside = [file / name for name in ("tokenizer.json", "tokenizer.model") if (file / name).is_file()]
        if not inside:
            raise ValueError(f"folder {file} holds no tokenizer.json and no tokenizer.model")
        file = inside[0]
    if not file.is_file():
        raise FileNotFoundError(f"no such tokenizer: {file}; expected {BYTES!r}, a tokenizer.json or a .model file")
    match file.suffix.lower():
        case ".json":
            return HuggingFaceTokenizer(file)
        case ".model":
            return SentencePieceTokenizer(file)
    raise ValueError(f"unknown tokenizer file {file}; expected one ending in .json (Hugging Face) or .model")


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


class _FileTokenizer:
    """What both libraries share: ids go in and out through `_encode` and `_decode`."""

    def __init__(self, file: Path, data: bytes) -> None:
        self.name = str(file)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocab_size = 0
        self.bos_id = 0
        self._skipped: frozenset[int] = frozenset()  # ids that decoding leaves out before it puts bytes together

    def _encode(self, text: str) -> Sequence[int]:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode(self, text: str, *, bos: bool = False) -> Int32[np.ndarray, " n"]:
        """Ids of the text, after the start token if `bos`.

        Raises TypeError if `text` is not a str; ValueError if it holds an unpaired surrogate, or what the tokenizer
        turns into its start token.
        """
        ids = np.asarray(self._encode(checked_text(text)), np.int32)
        if (at := np.flatnonzero(ids == self.bos_id)).size:
            raise ValueError(f"{self.name} makes token {int(at[0])} of the text its start token, {self.bos_id}")
        return np.concatenate([np.full(1, self.bos_id, np.int32), ids]) if bos else ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of ids [n], special tokens left out.

        Raises TypeError for ids that are not integers and ValueError for ids outside the vocabulary.
        """
        return self._decode(checked_ids(ids, self.vocab_size).tolist())

    def stream_decoder(self, context: Iterable[int] | np.ndarray = ()) -> TokenDecoder:
        """A decoder of ids that come after those of `context`, whose text is not repeated."""
        found = byte_tokens(self._id_of, self._decode)
        return TokenDecoder(self.decode, context, byte_tokens=found, skipped=self._skipped)

    def _id_of(self, token: str) -> int | None:
        raise NotImplementedError


class HuggingFaceTokenizer(_FileTokenizer):
    """A `tokenizer.json`, read by the library `tokenizers`. See `load_tokenizer`, also for what is raised."""

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
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{file} is not a Hugging Face tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # that is, as the text that they are
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
        found = self._tokenizer.token_to_id(token)
        return None if found in self._skipped else found


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece model, read by the library `sentencepiece`. See `load_tokenizer`, also for what is raised."""

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
        found = self._processor.piece_to_id(token)
        return found if self._processor.is_byte(found) else None


def _read(file: Path) -> bytes:
    if (size := file.stat().st_size) > _LARGEST_FILE:
        raise ValueError(f"{file} has {size:,} bytes; a tokenizer has at most {_LARGEST_FILE:,}")
    if not size:
        raise ValueError(f"{file} is empty")
    return file.read_bytes()


def _start_token(file: Path, ids: dict[str, int], special: list[str]) -> int:
    """The id of the token that starts documents. Raises ValueError if none is known."""
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
    try:
        values: Any = json.loads(_read(settings).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{settings} is not JSON: {error}") from error
    for key in ("bos_token", "eos_token"):
        token = values.get(key) if isinstance(values, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            yield token
