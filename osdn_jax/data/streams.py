"""Streams of documents from files or from a data set of the Hugging Face hub, with a position that can be saved."""

import copy
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from osdn_jax._errors import first_line
from osdn_jax._optional import require
from osdn_jax.data.documents import Document, checked_field, file_documents, missing_field, text_files

HUB = "hf:"  # the prefix of data sets on the hub

type StreamState = dict[str, Any]


class DocumentStream(Protocol):
    """An iterator over documents whose position can be saved and restored.

    Attributes:
        fingerprint: changes with what is read, as far as that is visible without reading it.
        size: the bytes of all text, or None if unknown.
        on_disk: True if reading it again costs only time.
    """

    fingerprint: str
    size: int | None
    on_disk: bool

    def __iter__(self) -> Iterator[Document]: ...

    def __next__(self) -> Document: ...

    def get_state(self) -> StreamState:
        """Return the position after the last document, in a form that JSON holds."""
        ...

    def set_state(self, state: StreamState | None) -> None:
        """Go to a position from `get_state`; None is the start."""
        ...


def open_stream(
    path: str | os.PathLike[str], *, field: str = "text", subset: str = "", split: str = "train"
) -> DocumentStream:
    """Open a file or folder as a `FileStream`, or "hf:NAME" as a `HubStream`.

    Args:
        path: a file, a folder or "hf:NAME".
        field: the name of the text in the rows of `.jsonl` and `.parquet` files and of data sets.
        subset: the subset (configuration) of a data set, such as "sample-10BT"; "" for its default.
        split: the split of a data set.

    Returns:
        The stream, at its start.

    Raises:
        FileNotFoundError, ConnectionError, ImportError, TypeError, ValueError: as the two classes.
    """
    if isinstance(path, str) and path.startswith(HUB):
        return HubStream(path, field=field, subset=subset, split=split)
    return FileStream(path, field=field)


class FileStream:
    """The documents of a file or folder, as `read_documents` returns them, without holding all of them in memory.

    Args:
        path: a file or folder.
        field: the name of the text in the rows of `.jsonl` and `.parquet` files.

    Raises:
        FileNotFoundError, TypeError, ValueError, ImportError: as `read_documents`, here and while it is read.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.txt").write_text("one")
        ...     _ = Path(folder, "b.txt").write_text("two")
        ...     stream = FileStream(folder)
        ...     print(next(stream).name, stream.get_state(), next(stream).name)
        a.txt {'file': 0, 'documents': 1} b.txt
    """

    on_disk = True

    def __init__(self, path: str | os.PathLike[str], *, field: str = "text") -> None:
        self._files = text_files(path, field)
        self._field = field
        sizes = [file.stat().st_size for file, _ in self._files]
        listing = [[name, size] for (_, name), size in zip(self._files, sizes, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        uncompressed = all(name.lower().endswith((".txt", ".jsonl")) for _, name in self._files)
        self.size = sum(sizes) if uncompressed else None
        self._file_index = self._documents_read = 0
        self._documents: Iterator[Document] | None = None

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while self._file_index < len(self._files):
            if self._documents is None:
                file, name = self._files[self._file_index]
                self._documents = itertools.islice(file_documents(file, name, self._field), self._documents_read, None)
            for document in self._documents:
                self._documents_read += 1
                return document
            self._file_index, self._documents_read, self._documents = self._file_index + 1, 0, None
        raise StopIteration

    def get_state(self) -> StreamState:
        """Return the position: the index of the file and the number of its documents that have been read."""
        return {"file": self._file_index, "documents": self._documents_read}

    def set_state(self, state: StreamState | None) -> None:
        """Go to a position from `get_state`; None is the start."""
        state = state or {"file": 0, "documents": 0}
        self._file_index, self._documents_read = int(state["file"]), int(state["documents"])
        self._documents = None


class HubStream:
    r"""The documents of a data set that the library `datasets` streams: "hf:NAME", or "hf:FOLDER" for one on disk.

    Only what is read is downloaded, and no code of the data set is executed. Line ends become "\n". NUL characters,
    which no document may hold, are removed. Rows without text are skipped.

    With several processes, each passes its own `shard_index`: the data set's files are divided between the processes
    if their number allows it, its rows otherwise.

    Args:
        path: "hf:NAME" or "hf:FOLDER".
        field: the name of the text in a row.
        subset: the subset (configuration) of the data set; "" for its default.
        split: the split of the data set.
        shard_index: the index of this process, in 0..shard_count - 1.
        shard_count: the number of processes.

    Raises:
        ImportError: `datasets` 4 or newer is missing; the message has the line that installs it.
        ConnectionError: the hub cannot be reached, here or while it is read; the message says what to use instead.
        ValueError: the hub does not have the name, subset or split; the field is missing (the message lists the
            existing ones) or is not text, here or while it is read.
    """

    on_disk = False

    def __init__(
        self,
        path: str,
        *,
        field: str = "text",
        subset: str = "",
        split: str = "train",
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> None:
        self._path, self._field = path, field
        name = path.removeprefix(HUB)
        if not name:
            raise ValueError(f"{path!r} names no data set; expected for example hf:HuggingFaceFW/fineweb-edu")
        library = require("datasets", "data", path)
        if int(library.__version__.partition(".")[0]) < 4:
            raise ImportError(f"{path} needs datasets ≥ 4, which runs no code of data sets; got {library.__version__}")
        self.fingerprint = f"{path} {subset} {split}"
        self.size: int | None = None
        data = self._call_library(lambda: library.load_dataset(name, name=subset or None, split=split, streaming=True))
        if data.features is not None and field not in data.features:
            raise missing_field(path, field, list(data.features), "data set")
        if shard_count > 1:
            distributed = require("datasets.distributed", "data", path)
            data = distributed.split_dataset_by_node(data, rank=shard_index, world_size=shard_count)
        self._data = data
        self._start = data.state_dict()
        self.set_state(None)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while True:
            row = self._call_library(lambda: next(self._rows, None))
            if row is None:
                raise StopIteration
            if self._field not in row:
                raise missing_field(self._path, self._field, list(row), "row")
            text = row[self._field]
            text = text.replace("\0", "") if isinstance(text, str) else text
            data = checked_field(self._path, text, self._field)
            if data.strip():
                return Document(self._path, data)

    def get_state(self) -> StreamState:
        """Return the position, as `datasets` describes it."""
        return self._data.state_dict()

    def set_state(self, state: StreamState | None) -> None:
        """Go to a position from `get_state`; None is the start."""
        # A copy, because the library keeps the state that it is given and changes it.
        self._data.load_state_dict(copy.deepcopy(self._start if state is None else state))
        self._rows = iter(self._data)

    def _call_library(self, call: Callable[[], Any]) -> Any:
        """Return call(), turning the library's errors into ones that name the data set and say what to do."""
        try:
            return call()
        except FileNotFoundError as error:
            raise ValueError(f"{self._path}: there is no such data set: {_reason(error)}") from error
        except (OSError, _transport_error()) as error:
            raise ConnectionError(
                f"{self._path} cannot be reached: {_reason(error)}. Without the hub, give a file or folder of "
                ".txt, .jsonl or .parquet, or a folder prepared on a machine that can reach it: "
                f"python -m osdn_jax.data.prepare --input {self._path} --tokenizer TOKENIZER --output FOLDER"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self._path}: {_reason(error)}") from error


def _transport_error() -> type[Exception]:
    """Return the exception of the hub's client for a failing network; older clients raise an OSError."""
    if importlib.util.find_spec("httpx") is None:
        return OSError
    return importlib.import_module("httpx").TransportError


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")
