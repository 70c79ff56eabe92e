"""Documents, and how they are read from disk: text, JSON Lines and Parquet files. Nothing in a file is executed."""

import gzip
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from osdn_jax._optional import require

SUPPORTED_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz", ".parquet")

_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256  # read at a time


class Document(NamedTuple):
    """A text that a model reads from its start token to its end.

    Attributes:
        name: its origin, for messages and tables ("macbeth", "notes/a.txt", "rows.jsonl:12").
        text: UTF-8 bytes without byte 0, which `ByteTokenizer` uses as the start token of a document.
    """

    name: str
    text: bytes


def read_documents(path: str | os.PathLike[str], *, field: str = "text") -> list[Document]:
    r"""Read all documents of a file, or of every supported file under a folder in order of relative path.

    Text is UTF-8; a byte order mark is dropped and line ends become "\n".

    | file | documents |
    | --- | --- |
    | `.txt` | one, named by its path |
    | `.jsonl` | the member `field` of the JSON object on each line, named "path:line" |
    | `.parquet` | the column `field` of each row, named "path:row"; needs pyarrow |

    Text and JSON Lines may be compressed as `.gz` or `.xz`. Endings match regardless of case. In a folder, files with
    other endings and names that start with "." are skipped, and links to folders are not followed. JSON Lines rows and
    Parquet rows without text are skipped, but a file without any text is an error.

    Args:
        path: a file or folder.
        field: the name of the text in the rows of `.jsonl` and `.parquet` files.

    Returns:
        The documents, at least one.

    Raises:
        FileNotFoundError: `path` does not exist.
        TypeError: an argument has the wrong type.
        ImportError: pyarrow is missing and a file is Parquet; the message has the line that installs it.
        ValueError: an unsupported ending, a folder without supported files, a file without text, a damaged compressed
            or Parquet file, bytes that are not UTF-8 text, malformed JSON, or a row whose `field` is missing or not a
            string. The message names the file and the place.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = Path(folder, "rows.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
        ...     read_documents(folder, field="body")
        [Document(name='rows.jsonl:1', text=b'one'), Document(name='rows.jsonl:2', text=b'two')]
    """
    return [document for file, name in text_files(path, field) for document in file_documents(file, name, field)]


def text_files(path: str | os.PathLike[str], field: str = "text") -> list[tuple[Path, str]]:
    """List (file, name of its documents) for a file or a folder. Raises as `read_documents` does for its arguments."""
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
    """Yield the documents of one file. Only a .txt file is held in memory. Raises as `read_documents`."""
    if not file.name.lower().endswith(SUPPORTED_ENDINGS):
        raise ValueError(f"unsupported file {file}; expected one ending in {_endings()}")
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    match Path(file.name.lower().removesuffix(".gz").removesuffix(".xz")).suffix:
        case ".jsonl":
            documents = _jsonl_documents(file, name, field)
        case ".parquet":
            documents = _parquet_documents(file, name, field)
        case _:
            documents = _text_document(file, name)
    found_text = False
    for document in documents:
        if document.text.strip():
            found_text = True
            yield document
    if not found_text:
        why = "nothing but blanks" if file.stat().st_size else "the file is empty"
        raise ValueError(f"{file} holds no text: {why}")


def checked_field(place: str, text: object, field: str) -> bytes:
    """Return the text of a row as a document's bytes. Raises ValueError, naming the place, unless it is text."""
    if not isinstance(text, str):
        raise ValueError(f"{place}: field {field!r} must be a string; got {_json_type(text)}")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: field {field!r} has an unpaired surrogate at character {error.start}") from error
    if b"\0" in encoded:
        raise ValueError(f"{place}: field {field!r} is not text: NUL at character {text.index(chr(0))}")
    return _normalise(encoded)


def missing_field(place: str, field: str, names: Iterable[str], container: str) -> ValueError:
    """Return the error for a row, file or data set (`container`) that has the fields `names` but not `field`."""
    return ValueError(f"{place}: no field {field!r}; the {container} has {', '.join(map(repr, names)) or 'no fields'}")


def _endings() -> str:
    return ", ".join(SUPPORTED_ENDINGS)


def _supported_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        # Editors and file managers write names with a leading dot, such as "._a.txt" on macOS.
        visible = (name for name in names if not name.startswith("."))
        found += [Path(folder, name) for name in visible if name.lower().endswith(SUPPORTED_ENDINGS)]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _raise(error: OSError) -> None:
    raise error


def _open_decompressed(file: Path) -> BinaryIO:
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
        with _open_decompressed(file) as lines:
            yield from lines
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{file} is not a complete {file.suffix.lower()} file: {error}") from error


def _checked_utf8(file: Path, data: bytes, offset: int = 0) -> bytes:
    """Return `data` if it is UTF-8 text. It starts at `offset`; offsets in messages count decompressed bytes."""
    if not offset and data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is not UTF-8 text: it starts with the byte order mark of UTF-16 at byte offset 0")
    if (position := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} is not text: NUL byte at byte offset {offset + position}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte 0x{data[error.start]:02x} at byte offset {offset + error.start} "
            f"({error.reason})"
        ) from error
    return data


def _normalise(data: bytes) -> bytes:
    return data.removeprefix(_BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _text_document(file: Path, name: str) -> Iterator[Document]:
    yield Document(name, _normalise(_checked_utf8(file, b"".join(_lines(file)))))


def jsonl_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of each line of a .jsonl file that is not blank. Raises ValueError unless it is text.

    The file may be compressed (.gz, .xz).
    """
    offset = 0
    for number, line in zip(itertools.count(1), _lines(file)):
        text = _checked_utf8(file, line, offset)
        if not offset:
            text = text.removeprefix(_BOM)
        offset += len(line)
        if text.strip():
            yield number, text


def _jsonl_documents(file: Path, name: str, field: str) -> Iterator[Document]:
    for number, text in jsonl_lines(file):
        yield Document(f"{name}:{number}", _jsonl_text(f"{file}, line {number}", text, field))


def _jsonl_text(place: str, line: bytes, field: str) -> bytes:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: malformed JSON: {error}") from error
    if (json_type := _json_type(row)) != "an object":
        raise ValueError(f"{place}: expected a JSON object with the field {field!r}; got {json_type}")
    if field not in row:
        raise missing_field(place, field, list(row), "row")
    return checked_field(place, row[field], field)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _parquet_documents(file: Path, name: str, field: str) -> Iterator[Document]:
    for row, value in enumerate(_parquet_values(file, field), start=1):
        yield Document(f"{name}:{row}", checked_field(f"{file}, row {row}", value, field))


def _parquet_values(file: Path, field: str) -> Iterator[str | None]:
    """Yield the values of a column of strings in order, without holding a row group as text in memory."""
    require("pyarrow", "data", "reading .parquet files")
    parquet: Any = require("pyarrow.parquet", "data", "reading .parquet files")
    types: Any = require("pyarrow.types", "data", "reading .parquet files")
    arrow_error = require("pyarrow.lib", "data", "reading .parquet files").ArrowException
    try:
        with parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise missing_field(str(file), field, schema.names, "file")
            column_type = schema.field(field).type
            value_type = column_type.value_type if types.is_dictionary(column_type) else column_type
            if not any(test(value_type) for test in (types.is_string, types.is_large_string, types.is_string_view)):
                raise ValueError(f"{file}: field {field!r} must be of strings; got {column_type}")
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
                yield from batch.column(0).to_pylist()
    except (arrow_error, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a complete Parquet file: {error}") from error
