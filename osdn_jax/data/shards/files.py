"""The two files of a token shard: the documents as records, and their lengths. `manifest` describes the format."""

import os
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int, UInt32

from osdn_jax._optional import require

_INDEX = np.dtype("<u4")


def record_file(folder: Path, number: int) -> Path:
    """Return the path of the records of shard `number`."""
    return folder / f"shard-{number:05}.array_record"


def index_file(folder: Path, number: int) -> Path:
    """Return the path of the document lengths of shard `number`."""
    return folder / f"shard-{number:05}.index"


def _array_record() -> ModuleType:
    return require("array_record.python.array_record_module", "data", "prepared data")


class ShardWriter:
    """Writes a shard under temporary names, which `finish` replaces by the final ones. Use it as a context manager.

    If the block ends without `finish`, the temporary files are removed.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._files = [record_file(folder, number), index_file(folder, number)]
        self._temporary = [file.with_name(f".{file.name}.tmp") for file in self._files]
        # With one record per group, reading a document decodes no other one.
        self._writer = _array_record().ArrayRecordWriter(str(self._temporary[0]), "group_size:1")
        self._lengths: list[tuple[int, int]] = []

    def write(self, record: bytes, tokens: int, text_bytes: int) -> None:
        """Add a document: its ids as bytes, the number of ids and the bytes of its text."""
        if max(tokens, text_bytes) >= 2**32:
            raise ValueError(f"a document has {text_bytes:,} bytes of text; the largest possible is {2**32 - 1:,}")
        self._writer.write(record)
        self._lengths.append((tokens, text_bytes))

    def finish(self) -> tuple[int, int, int, int]:
        """Complete the shard; return its numbers of documents, tokens, bytes of text and bytes of the record file."""
        self._writer.close()
        lengths = np.asarray(self._lengths, np.int64).reshape(-1, 2)
        self._temporary[1].write_bytes(lengths.astype(_INDEX).tobytes())
        size = self._temporary[0].stat().st_size
        for temporary, file in reversed(list(zip(self._temporary, self._files, strict=True))):
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, file)
        tokens, text_bytes = lengths.sum(0).tolist()
        return len(lengths), tokens, text_bytes, size

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer.is_open():
            self._writer.close()
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)


def read_lengths(file: Path, documents: int) -> UInt32[np.ndarray, "documents 2"]:
    """Return (tokens, bytes of text) of each document. Raises ValueError if the file has another size."""
    check_size(file, documents * 2 * _INDEX.itemsize)
    return np.fromfile(file, _INDEX).reshape(-1, 2)


class ShardReader:
    """Reads documents of one shard. Raises ValueError, naming the file, if it has changed since it was written."""

    def __init__(self, file: Path, *, documents: int, file_bytes: int, dtype: np.dtype, vocab_size: int) -> None:
        self._file, self._dtype, self._vocab_size = file, dtype, vocab_size
        check_size(file, file_bytes)
        self._reader: Any = _array_record().ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
        if not self._reader.ok() or self._reader.num_records() != documents:
            raise ValueError(f"{file} is no ArrayRecord file of {documents:,} records: it is damaged, or of other data")

    def read(self, first: int, stop: int) -> list[Int[np.ndarray, " n"]]:
        """Return the token ids of documents first to stop - 1."""
        try:
            records = self._reader.read(first, stop)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{self._file} is damaged: {error}") from error
        return [self._ids(first + i, record) for i, record in enumerate(records)]

    def _ids(self, document: int, record: bytes) -> Int[np.ndarray, " n"]:
        if len(record) % self._dtype.itemsize:
            raise ValueError(
                f"{self._file}, document {document}: got {len(record)} bytes, expected a multiple of "
                f"{self._dtype.itemsize}, the size of {self._dtype.name} ids"
            )
        ids = np.frombuffer(record, self._dtype)
        if ids.size and (largest := int(ids.max())) >= self._vocab_size:
            raise ValueError(
                f"{self._file}, document {document}: token {largest} is beyond the vocabulary of {self._vocab_size}"
            )
        return ids


def check_size(file: Path, file_bytes: int) -> None:
    """Raise ValueError if the file does not exist or does not have the size that it was written with."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist; run python -m osdn_jax.data.prepare again")
    if (size := file.stat().st_size) != file_bytes:
        raise ValueError(f"{file} has {size:,} bytes, expected {file_bytes:,}: it is truncated, or of other data")
