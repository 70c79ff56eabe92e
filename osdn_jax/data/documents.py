"""A user's own text from disk. Files are only ever read as text, JSON or Parquet; nothing in them is executed."""

import gzip
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from osdn_jax._optional import require

SUPPORTED_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz", ".parquet")

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256  # at a time


class Document(NamedTuple):
    """One piece of text.

    name: where it came from, for messages and tables ("macbeth", "notes/a.txt", "rows.jsonl:12").
    text: UTF-8 bytes without byte 0, which is the start token of a document (see `ByteTokenizer`).
    """

    name: str
    text: bytes


def read_documents(path: str | os.PathLike[str], *, field: str = "text") -> list[Document]:
    """Documents of a file, or of all supported files under a folder in the order of their relative paths.

    A .txt file is one document, named by its path; a .jsonl file has one JSON object per line, and its member `field`
    is a document named "path:line"; the column `field` of a .parquet file has documents named "path:row". Text and
    JSONL may be compressed as .gz or .xz. Endings are matched without regard to case. In a folder, files of other
    kinds and names that start with "." are passed over, and links to folders are not followed. Text is UTF-8; a byte
    order mark is dropped and line ends become "\\n". JSONL lines and rows without any text are passed over, but a file
    without any text is an error.

    Raises FileNotFoundError if there is no such path, TypeError if an argument has the wrong type, ImportError where
    the library for Parquet is missing, and ValueError, naming file and place, for an unsupported ending, a folder
    without supported files, a file without text, damaged compression or damaged Parquet, bytes that are not UTF-8
    text, malformed JSON, and rows where `field` is missing or not a string.
    """
    return [document for file, name in text_files(path, field) for document in file_documents(file, name, field)]


def text_files(path: str | os.PathLike[str], field: str = "text") -> list[tuple[Path, str]]:
    """[(file, its name in messages)] of a file or a folder. Raises as `read_documents` does for its arguments."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or a path; got {type(path).__name__}")
    if not isinstance(field, str):
        raise TypeError(f"field must be a str; got {type(field).__name__}")
    if not os.fspath(path):
        raise ValueError(f"path must not be empty; expected a folder or a file ending in {_endings()}")
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    if not root.is_dir():
        return [(root, root.name)]
    files = _supported_files(root)
    if not files:
        raise ValueError(f"folder {root} holds no supported file; expected files ending in {_endings()}")
    return [(file, file.relative_to(root).as_posix()) for file in files]


def file_documents(file: Path, name: str, field: str) -> Iterator[Document]:
    """Documents of one file, one after the other: only a .txt file is held in memory. Raises as `read_documents`."""
    if not file.name.lower().endswith(SUPPORTED_ENDINGS):
        raise ValueError(f"unsupported file {file}; expected one ending in {_endings()}")
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    match Path(file.name.lower().removesuffix(".gz").removesuffix(".xz")).suffix:
        case ".jsonl":
            documents = _rows(file, name, field)
        case ".parquet":
            values = enumerate(_parquet_values(file, field), start=1)
            documents = (
                Document(f"{name}:{row}", checked_field(f"{file}, row {row}", value, field)) for row, value in values
            )
        case _:
            documents = _whole(file, name)
    some = False
    for document in documents:
        if document.text.strip():
            some = True
            yield document
    if not some:
        why = "nothing but blanks" if file.stat().st_size else "the file is empty"
        raise ValueError(f"{file} holds no text: {why}")


def checked_field(place: str, text: object, field: str) -> bytes:
    """The text of a row as a document has it. Raises ValueError, naming the place, for what is not text."""
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {field!r} must be a string; got {_json_type(text)}")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: field {field!r} has an unpaired surrogate at character {error.start}") from error
    if b"\0" in encoded:
        raise ValueError(f"{place}: field {field!r} is not text: NUL at character {text.index(chr(0))}")
    return _normalised(encoded)


def missing_field(place: str, field: str, there: Iterator[str] | list[str], what: str) -> ValueError:
    """The error of a row or a file (`what`) without the field."""
    return ValueError(f"{place}: no field {field!r}; the {what} has {', '.join(map(repr, there)) or 'no fields'}")


def _endings() -> str:
    return ", ".join(SUPPORTED_ENDINGS)


def _supported_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        # Names with a dot in front are editors' and file managers' own, such as the "._a.txt" of macOS.
        shown = (name for name in names if not name.startswith("."))
        found += [Path(folder, name) for name in shown if name.lower().endswith(SUPPORTED_ENDINGS)]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _raise(error: OSError) -> None:
    raise error


def _opened(file: Path) -> BinaryIO:
    if not file.stat().st_size:  # an empty file counts as an empty text, compressed or not
        return file.open("rb")
    match file.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(file, "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(file, "rb"))
    return file.open("rb")


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with _opened(file) as lines:
            yield from lines
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{file} is not a complete {file.suffix.lower()} file: {error}") from error


def _checked_text(file: Path, data: bytes, offset: int = 0) -> bytes:
    """`data` if it is UTF-8 text; it starts at `offset`, and offsets in messages count decompressed bytes."""
    if not offset and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is not UTF-8 text: it starts with the byte order mark of UTF-16 at byte offset 0")
    if (at := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} is not text: NUL byte at byte offset {offset + at}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(
            f"{file} is not UTF-8 text: byte 0x{data[error.start]:02x} at byte offset {at} ({error.reason})"
        ) from error
    return data


def _normalised(data: bytes) -> bytes:
    return data.removeprefix(_BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _whole(file: Path, name: str) -> Iterator[Document]:
    yield Document(name, _normalised(_checked_text(file, b"".join(_lines(file)))))


def _rows(file: Path, name: str, field: str) -> Iterator[Document]:
    offset = 0
    for number, line in zip(itertools.count(1), _lines(file)):
        text = _checked_text(file, line, offset)
        if not offset:
            text = text.removeprefix(_BOM)
        offset += len(line)
        if text.strip():
            yield Document(f"{name}:{number}", _row_text(f"{file}, line {number}", text, field))


def _row_text(place: str, line: bytes, field: str) -> bytes:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: malformed JSON: {error}") from error
    if (kind := _json_type(row)) != "an object":
        raise ValueError(f"{place}: expected a JSON object with the field {field!r}; got {kind}")
    if field not in row:
        raise missing_field(place, field, list(row), "row")
    return checked_field(place, row[field], field)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _parquet_values(file: Path, field: str) -> Iterator[str | None]:
    """The values of the column `field`, in order, without holding a row group as text in memory.

    Raises ImportError where pyarrow is missing; ValueError, naming the file, if it is no complete Parquet file, if it
    has no such column (names those there are) or if that is not of strings.
    """
    require("pyarrow", "data", "reading .parquet files")
    pyarrow: Any = require("pyarrow.parquet", "data", "reading .parquet files")
    types: Any = require("pyarrow.types", "data", "reading .parquet files")
    errors = require("pyarrow.lib", "data", "reading .parquet files").ArrowException
    try:
        with pyarrow.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            if field not in schema.names:
                there = ", ".join(map(repr, schema.names)) or "no fields"
                raise ValueError(f"{file}: no field {field!r}; the file has {there}")
            kind = schema.field(field).type
            value = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
                raise ValueError(f"{file}: field {field!r} must be of strings; got {kind}")
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                yield from batch.column(0).to_pylist()
    except (errors, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a complete Parquet file: {error}") from error
