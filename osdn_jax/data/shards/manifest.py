"""`dataset.json`, the manifest of a folder of token shards: its contents and the settings that made it.

    {"format": "osdn-jax token shards", "version": 1,
     "tokenizer": {"fingerprint": ..., "vocab_size": ..., "start_id": ...},
     "dtype": "uint16",
     "settings": {...},              everything else that the shards depend on
     "complete": true,               false while shards are missing
     "shards": [{"documents": ..., "tokens": ..., "text_bytes": ..., "file_bytes": ..., "end": ...,
                 "text_digest": ...}, ...]}

Shard n has two files. `shard-0000n.array_record` has a record per document: its token ids, without the start token, as
little-endian unsigned integers of `dtype`. `shard-0000n.index` has two little-endian uint32 per document: the number of
its tokens and the bytes of its text. `end` is the position in the input after the shard. `text_digest` is a hash of the
shard's text, which tells whether the input has changed; folders written by the first versions do not have it.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from osdn_jax._files import write_atomically
from osdn_jax.data.tokenizers import Tokenizer, token_dtype

MANIFEST_FILE = "dataset.json"

_FORMAT = "osdn-jax token shards"
_VERSION = 1
_MAX_MANIFEST_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard.

    Attributes:
        documents: the number of its documents.
        tokens: the number of its tokens, without start tokens.
        text_bytes: the bytes of its text.
        file_bytes: the bytes of its .array_record file.
        end: the position in the input after the shard.
        text_digest: a hash of its text, "" if unknown.
    """

    documents: int
    tokens: int
    text_bytes: int
    file_bytes: int
    end: dict[str, Any]
    text_digest: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a `dataset.json`; `load_manifest` reads one.

    Attributes:
        fingerprint: the tokenizer's fingerprint.
        vocab_size: the tokenizer's vocabulary size.
        start_id: the token before each document.
        settings: everything else that the shards depend on.
        complete: True if no shard is missing.
        shards: the complete shards, in order.
    """

    fingerprint: str
    vocab_size: int
    start_id: int
    settings: dict[str, Any]
    complete: bool = False
    shards: tuple[Shard, ...] = ()

    @property
    def dtype(self) -> str:
        """The name of the integer type of the ids."""
        return token_dtype(self.vocab_size).name

    @property
    def tokens(self) -> int:
        """The number of tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """The number of documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """The bytes of text of all shards."""
        return sum(shard.text_bytes for shard in self.shards)

    def check_tokenizer(self, tokenizer: Tokenizer, place: str) -> None:
        """Raise ValueError if the shards were made with another tokenizer, vocabulary size or start token."""
        for name, prepared, given in (
            ("", self.fingerprint, tokenizer.fingerprint),
            ("vocabulary size ", self.vocab_size, tokenizer.vocab_size),
            ("start token ", self.start_id, tokenizer.bos_id),
        ):
            if prepared != given:
                raise ValueError(
                    f"{place} was prepared with another tokenizer: {name}{str(prepared)[:16]} there, "
                    f"{name}{str(given)[:16]} of {tokenizer.name}"
                )

    def save(self, folder: Path) -> None:
        """Write the manifest into the folder: readers, and a crash, see either the old one or the new one."""
        values = {
            "format": _FORMAT,
            "version": _VERSION,
            "tokenizer": {
                "fingerprint": self.fingerprint,
                "vocab_size": self.vocab_size,
                "start_id": self.start_id,
            },
            "dtype": self.dtype,
            "settings": self.settings,
            "complete": self.complete,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
        }
        write_atomically(folder / MANIFEST_FILE, json.dumps(values, indent=1) + "\n")


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a prepared folder.

    Args:
        folder: the folder that `python -m osdn_jax.data.prepare` wrote.

    Returns:
        The manifest, complete or not.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: the file is not a manifest that `prepare` writes; the message names the file and the key.
    """
    file = Path(folder) / MANIFEST_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: was the folder written by python -m osdn_jax.data.prepare?")
    if (size := file.stat().st_size) > _MAX_MANIFEST_BYTES:
        raise ValueError(f"{file} has {size:,} bytes; expected at most {_MAX_MANIFEST_BYTES:,}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise ValueError(f"{file} is no manifest of python -m osdn_jax.data.prepare")
    if values.get("version") != _VERSION:
        raise ValueError(f"{file} is of format version {values.get('version')!r}; this program reads {_VERSION}")
    place = str(file)
    tokenizer = _member(place, values, "tokenizer", dict)
    shards = []
    for number, entry in enumerate(_member(place, values, "shards", list)):
        shard_place = f"{place}, shard {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{shard_place}: expected an object; got {entry!r}")
        counts = {
            name: _count(shard_place, entry, name) for name in ("documents", "tokens", "text_bytes", "file_bytes")
        }
        digest = _member(shard_place, {"text_digest": ""} | entry, "text_digest", str)
        shards.append(Shard(**counts, end=_member(shard_place, entry, "end", dict), text_digest=digest))
    manifest = Manifest(
        fingerprint=_member(place, tokenizer, "fingerprint", str),
        vocab_size=_count(place, tokenizer, "vocab_size", largest=2**31),
        start_id=_count(place, tokenizer, "start_id"),
        settings=_member(place, values, "settings", dict),
        complete=_member(place, values, "complete", bool),
        shards=tuple(shards),
    )
    if not manifest.start_id < manifest.vocab_size:
        raise ValueError(f"{file}: start_id {manifest.start_id} is not below vocab_size {manifest.vocab_size}")
    if values.get("dtype") != manifest.dtype:
        raise ValueError(f"{file}: dtype: got {values.get('dtype')!r}, expected {manifest.dtype!r}")
    return manifest


def _member(place: str, values: dict[str, Any], name: str, json_type: type) -> Any:
    value = values.get(name)
    if not isinstance(value, json_type):
        raise ValueError(f"{place}: {name}: got {value!r}, expected a JSON value of type {json_type.__name__}")
    return value


def _count(place: str, values: dict[str, Any], name: str, *, largest: int = 2**62) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{place}: {name}: got {value!r}, expected an integer from 0 to {largest}")
    return value
