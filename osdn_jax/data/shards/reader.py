"""Prepared token shards as token streams that are read from disk; only an index is held in memory."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from osdn_jax.data.shards.files import ShardReader, check_size, index_file, read_lengths, record_file
from osdn_jax.data.shards.manifest import MANIFEST_FILE, Manifest, load_manifest
from osdn_jax.data.tokenizers import token_dtype

_MAX_OPEN_FILES = 64


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Return True if the path is a folder with the manifest of prepared data."""
    return (Path(path) / MANIFEST_FILE).is_file()


class PreparedTokens:
    """The documents of a prepared folder, or a range of them, as a `TokenStream` that is read from disk by position.

    An index of at most 16 bytes per document is held in memory. Can be pickled, and read by several threads.

    Args:
        folder: the folder that `python -m osdn_jax.data.prepare` wrote.

    Attributes:
        manifest: the manifest of the whole folder.
        documents: the number of documents.
        text_tokens: the number of tokens, without start tokens.
        text_bytes: the bytes of text that these tokens stand for.
        start_id: the token before each document.

    Raises:
        FileNotFoundError: the folder has no manifest.
        ValueError: data is incomplete, truncated, damaged or beyond its vocabulary; the message names the file. Sizes
            are checked when the folder is opened, contents when they are read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from osdn_jax.data import TokenWindows
        >>> from osdn_jax.data.prepare import prepare
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "notes.txt").write_text("some text")
        ...     _ = prepare(Path(folder, "notes.txt"), Path(folder, "tokens"), tokenizer="bytes")
        ...     windows = TokenWindows(PreparedTokens(Path(folder, "tokens")), 4)
        ...     bytes(windows[1]["inputs"].tolist())
        b'e te'
    """

    on_disk = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self.manifest: Manifest = load_manifest(folder)
        if not self.manifest.complete:
            raise ValueError(f"{folder} is not complete: run the command that made it again to finish it")
        if not self.manifest.tokens:
            raise ValueError(f"{folder} holds no tokens")
        self.start_id = self.manifest.start_id
        lengths = []
        for number, shard in enumerate(self.manifest.shards):
            check_size(record_file(self._folder, number), shard.file_bytes)
            index = index_file(self._folder, number)
            lengths.append(read_lengths(index, shard.documents).astype(np.int64))
            if lengths[-1].sum(0).tolist() != [shard.tokens, shard.text_bytes]:
                raise ValueError(f"{index} does not agree with {MANIFEST_FILE}: it is damaged, or of other data")
        tokens, text = np.concatenate(lengths).T
        # Positions of the documents in the stream, each with its start token.
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(tokens + 1)])
        self._shard_starts = np.cumsum([0, *(shard.documents for shard in self.manifest.shards)])
        self._readers = _Readers(self._folder, self.manifest)
        self._text_ends: np.ndarray | None = np.cumsum(text)  # for split(); None for a part
        self._set_range(0, len(tokens), int(text.sum()))

    def _set_range(self, first: int, stop: int, text_bytes: int) -> None:
        self._first, self._stop = first, stop
        self._offset = int(self._starts[first])
        self._length = int(self._starts[stop]) - self._offset
        self.documents = stop - first
        self.text_tokens = self._length - self.documents
        self.text_bytes = text_bytes

    def split(self, validation_fraction: float) -> tuple["PreparedTokens", "PreparedTokens"]:
        """Hold out the last documents, with about this fraction of the bytes of text.

        Args:
            validation_fraction: between 0 and 1, both excluded.

        Returns:
            (training documents, validation documents).

        Raises:
            ValueError: the fraction is out of range, documents are too large to hold out the fraction to within a
                factor of two, or this is already a part of a folder.
        """
        if isinstance(validation_fraction, bool) or not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, both excluded; got {validation_fraction!r}")
        ends = self._text_ends
        if ends is None:
            raise ValueError("only a whole folder can be split")
        total = int(ends[-1])
        target = validation_fraction * total
        held_out_bytes = total - ends[:-1]  # element i: if the first i + 1 documents are trained on
        cut = int(np.argmin(abs(held_out_bytes - target))) if len(held_out_bytes) else 0
        if not len(held_out_bytes) or not target / 2 <= held_out_bytes[cut] <= 2 * target:
            raise ValueError(
                f"{self._folder}: cannot hold out {validation_fraction:g} of {len(ends)} documents, {total:,} bytes, "
                "within a factor of two; prepare a separate text for validation"
            )
        train = self._part(0, cut + 1, int(ends[cut]))
        return train, self._part(cut + 1, len(ends), int(held_out_bytes[cut]))

    def _part(self, first: int, stop: int, text_bytes: int) -> "PreparedTokens":
        part = object.__new__(PreparedTokens)
        part.__dict__.update(self.__dict__)
        part._set_range(first, stop, text_bytes)
        part._text_ends = None
        return part

    def __len__(self) -> int:
        """Return the number of tokens, start tokens included."""
        return self._length

    def read(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Return the tokens at positions start to stop - 1, fewer at the end."""
        start, stop = start + self._offset, min(stop, self._length) + self._offset
        tokens = np.full(max(stop - start, 0), self.start_id, np.int32)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        for document, ids in zip(range(first, last), self._documents(first, last), strict=True):
            text_start = int(self._starts[document]) + 1  # after the start token
            begin, end = max(start, text_start), min(stop, text_start + len(ids))
            if begin < end:
                tokens[begin - start : end - start] = ids[begin - text_start : end - text_start]
        return tokens

    def _documents(self, first: int, stop: int) -> list[Int[np.ndarray, " n"]]:
        found = []
        while first < stop:
            shard = int(np.searchsorted(self._shard_starts, first, side="right")) - 1
            base, end = int(self._shard_starts[shard]), int(self._shard_starts[shard + 1])
            count = min(stop, end) - first
            found += self._readers.read(shard, first - base, first - base + count)
            first += count
        for document, ids in enumerate(found, start=stop - len(found)):
            expected = int(self._starts[document + 1] - self._starts[document]) - 1
            if len(ids) != expected or (ids == self.start_id).any():
                shard = int(np.searchsorted(self._shard_starts, document, side="right")) - 1
                raise ValueError(
                    f"{record_file(self._folder, shard)}, document {document - int(self._shard_starts[shard])}: "
                    f"expected {expected} tokens without the start token {self.start_id}; "
                    "it is damaged, or of other data"
                )
        return found

    def __repr__(self) -> str:
        return f"PreparedTokens({str(self._folder)!r}, {self.documents} documents, {self.text_tokens} tokens of text)"


class _Readers:
    """Readers of the most recently used shards, opened on demand."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int, first: int, stop: int) -> list[Int[np.ndarray, " n"]]:
        """Return documents first to stop - 1 of a shard."""
        with self._lock:
            reader = self._open.get(number) or self._reader(number)
            self._open[number] = reader
            self._open.move_to_end(number)
            if len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        return reader.read(first, stop)

    def _reader(self, number: int) -> ShardReader:
        shard = self._manifest.shards[number]
        return ShardReader(
            record_file(self._folder, number),
            documents=shard.documents,
            file_bytes=shard.file_bytes,
            dtype=token_dtype(self._manifest.vocab_size),
            vocab_size=self._manifest.vocab_size,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{name.removeprefix("_"): value for name, value in state.items()})  # type: ignore[misc]
