"""`dataset.json`: what a folder of prepared token shards holds, and how it was made.

    {"format": "osdn-jax token shards", "version": 1,
     "tokenizer": {"fingerprint": ..., "vocab_size": ..., "start_id": ...},
     "dtype": "uint16",
     "settings": {...},              what the shards depend on besides the tokenizer
     "complete": true,               false while there is more to write
     "shards": [{"documents": ..., "tokens": ..., "text_bytes": ..., "file_bytes": ..., "end": ...,
                 "text_digest": ...}, ...]}

Shard n is two files. `shard-0000n.array_record` has a record for each document: its token ids, without start token, as
little-endian unsigned integers of `dtype`. `shard-0000n.index` has two little-endian uint32 for each document: its
number of tokens and its bytes of text. `end` is the position in the input after the shard. `text_digest` tells its text
from another one; folders of earlier versions do not have it.
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
_LARGEST_MANIFEST = 1 << 28


@dataclasses.dataclass(frozen=True)
class Shard:
    """One complete shard: numbers of documents, tokens, bytes of text and bytes of its .array_record file.

    text_digest is "" where it is not known.
    """

    documents: int
    tokens: int
    text_bytes: int
    file_bytes: int
    end: dict[str, Any]
    text_digest: str = ""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a `dataset.json`."""

    fingerprint: str
    vocab_size: int
    start_id: int
    settings: dict[str, Any]
    complete: bool = False
    shards: tuple[Shard, ...] = ()

    @property
    def dtype(self) -> str:
        """The name of the ids' type."""
        return token_dtype(self.vocab_size).name

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """Bytes of text of all shards."""
        return sum(shard.text_bytes for shard in self.shards)

    def check_tokenizer(self, tokenizer: Tokenizer, place: str) -> None:
        """Raises ValueError if the shards were made with another tokenizer, or another start token of it."""
        for name, there, here in (
            ("", self.fingerprint, tokenizer.fingerprint),
            ("vocabulary size ", self.vocab_size, tokenizer.vocab_size),
            ("start token ", self.start_id, tokenizer.bos_id),
        ):
            if there != here:
                raise ValueError(
                    f"{place} was prepared with another tokenizer: {name}{str(there)[:16]} there, "
                    f"{name}{str(here)[:16]} of {tokenizer.name}"
                )

    def save(self, folder: Path) -> None:
        """Writes the file, so that a reader or a crash sees the old one or the new one."""
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
    """The manifest of a folder.

    Raises FileNotFoundError if there is none; ValueError, naming the file and the key, if it is not what `prepare`
    writes.
    """
    file = Path(folder) / MANIFEST_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: was the folder written by python -m osdn_jax.data.prepare?")
    if (size := file.stat().st_size) > _LARGEST_MANIFEST:
        raise ValueError(f"{file} has {size:,} bytes; expected at most {_LARGEST_MANIFEST:,}")
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
        at = f"{place}, shard {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{at}: expected an object; got {entry!r}")
        counts = {name: _count(at, entry, name) for name in ("documents", "tokens", "text_bytes", "file_bytes")}
        digest = _member(at, {"text_digest": ""} | entry, "text_digest", str)
        shards.append(Shard(**counts, end=_member(at, entry, "end", dict), text_digest=digest))
    manifest = Manifest(
        fingerprint=_member(place, tokenizer, "fingerprint", str),
        vocab_size=_count(place, tokenizer, "vocab_size", most=2**31),
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


def _member(place: str, values: dict[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{place}: {name}: got {value!r}, expected a JSON value of type {kind.__name__}")
    return value


def _count(place: str, values: dict[str, Any], name: str, *, most: int = 2**62) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{place}: {name}: got {value!r}, expected an integer from 0 to {most}")
    return value
