"""Documents one after the other from files, or from a data set of the Hugging Face hub, at a position that is saved."""

import copy
import hashlib
import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from osdn_jax._errors import first_line
from osdn_jax._optional import require
from osdn_jax.data.documents import Document, checked_field, file_documents, missing_field, text_files

HUB = "hf:"  # what paths of data sets on the hub start with

type StreamState = dict[str, Any]


class DocumentStream(Protocol):
    """An iterator over documents that can be set to where it was.

    fingerprint: changes with what is read, as far as that shows without reading it.
    size: bytes of text in all, if they are known.
    on_disk: whether it can be read again at no cost but the time.
    """

    fingerprint: str
    size: int | None
    on_disk: bool

    def __iter__(self) -> Iterator[Document]: ...

    def __next__(self) -> Document: ...

    def get_state(self) -> StreamState:
        """The position after the last document, as JSON holds it."""
        ...

    def set_state(self, state: StreamState | None) -> None:
        """Goes to a position of `get_state`; None is the start."""
        ...


def open_stream(
    path: str | os.PathLike[str], *, field: str = "text", subset: str = "", split: str = "train"
) -> DocumentStream:
    """The documents of a file or folder as `read_documents` reads them, or of "hf:NAME" as `HubStream` does."""
    if isinstance(path, str) and path.startswith(HUB):
        return HubStream(path, field=field, subset=subset, split=split)
    return FileStream(path, field=field)


class FileStream:
    """Documents of a file or folder as `read_documents` has them, without holding them all."""

    on_disk = True

    def __init__(self, path: str | os.PathLike[str], *, field: str = "text") -> None:
        self._files = text_files(path, field)
        self._field = field
        sizes = [file.stat().st_size for file, _ in self._files]
        listing = [[name, size] for (_, name), size in zip(self._files, sizes, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        plain = all(name.lower().endswith((".txt", ".jsonl")) for _, name in self._files)
        self.size = sum(sizes) if plain else None
        self._file = self._done = 0
        self._documents: Iterator[Document] | None = None

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while self._file < len(self._files):
            if self._documents is None:
                file, name = self._files[self._file]
                self._documents = itertools.islice(file_documents(Path(file), name, self._field), self._done, None)
            for document in self._documents:
                self._done += 1
                return document
            self._file, self._done, self._documents = self._file + 1, 0, None
        raise StopIteration

    def get_state(self) -> StreamState:
        """The position: the file's number and how many of its documents are done."""
        return {"file": self._file, "documents": self._done}

    def set_state(self, state: StreamState | None) -> None:
        """Goes to a position of `get_state`; None is the start."""
        state = state or {"file": 0, "documents": 0}
        self._file, self._done = int(state["file"]), int(state["documents"])
        self._documents = None


class HubStream:
    """Documents of a data set that the library `datasets` streams: "hf:NAME", or "hf:FOLDER" of one on disk.

    Nothing is downloaded but what is read, and no code of the data set's is run. Line ends become "\\n", and NUL
    characters, which no document may have, are left out; rows without text are passed over.

    With several processes each passes its own `shard_index` of `shard_count`: the data set's files are divided between
    them where their number allows it, and its rows otherwise.

    Raises, here and while it is read: ImportError where `datasets` is missing; ConnectionError if the hub cannot be
    reached, with what to use instead; ValueError for a name, subset or split that the hub does not have, a missing
    field (names those there are) or one that is not text.
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
        data = self._reaching(lambda: library.load_dataset(name, name=subset or None, split=split, streaming=True))
        if data.features is not None and field not in data.features:
            raise missing_field(path, field, list(data.features), "data set")
        if shard_count > 1:
            splitting = require("datasets.distributed", "data", path)
            data = splitting.split_dataset_by_node(data, rank=shard_index, world_size=shard_count)
        self._data = data
        self._start = data.state_dict()
        self.set_state(None)

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        while True:
            row = self._reaching(lambda: next(self._rows, None))
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
        """The position, as `datasets` describes it."""
        return self._data.state_dict()

    def set_state(self, state: StreamState | None) -> None:
        """Goes to a position of `get_state`; None is the start."""
        self._data.load_state_dict(copy.deepcopy(self._start if state is None else state))  # it keeps what it is given
        self._rows = iter(self._data)

    def _reaching(self, call: Callable[[], Any]) -> Any:
        """call(), with errors of the library in our words."""
        try:
            return call()
        except FileNotFoundError as error:
            raise ValueError(f"{self._path}: there is no such data set: {first_line(error).rstrip('.')}") from error
        except (OSError, _transport_error()) as error:
            raise ConnectionError(
                f"{self._path} cannot be reached: {first_line(error).rstrip('.')}. Without the hub give a file or "
                "folder of .txt, .jsonl or .parquet, or a folder made on a machine that reaches it: "
                f"python -m osdn_jax.data.prepare --input {self._path} --tokenizer TOKENIZER --output FOLDER"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self._path}: {first_line(error).rstrip('.')}") from error


def _transport_error() -> type[Exception]:
    """What the hub's client raises when the network fails; with older clients that is an OSError."""
    if importlib.util.find_spec("httpx") is None:
        return OSError
    return importlib.import_module("httpx").TransportError
