"""A user's own text from disk. Files are only ever read as text or JSON; nothing in them is executed."""

import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from osdn_jax.data.documents import Document

SUPPORTED_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz")

_BOM = b"\xef\xbb\xbf"


def read_documents(path: str | os.PathLike[str], *, field: str = "text") -> list[Document]:
    """Documents of a file, or of all supported files under a folder in the order of their relative paths.

    A .txt file is one document, named by its path; a .jsonl file has one JSON object per line, and its member `field`
    is a document named "path:line". Each may be compressed as .gz or .xz. Endings are matched without regard to case.
    In a folder, files of other kinds and names that start with "." are passed over, and links to folders are not
    followed. Text is UTF-8; a byte order mark is dropped and line ends become "\\n". JSONL lines and rows without
    any text are passed over, but a file without any text is an error.

    Raises FileNotFoundError if there is no such path, TypeError if an argument has the wrong type, and ValueError,
    naming file and place, for an unsupported ending, a folder without supported files, a file without text, damaged
    compression, bytes that are not UTF-8 text, malformed JSON, and rows where `field` is missing or not a string.
    """
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
        return _read_file(root, root.name, field)
    files = _supported_files(root)
    if not files:
        raise ValueError(f"folder {root} holds no supported file; expected files ending in {_endings()}")
    return [document for file in files for document in _read_file(file, file.relative_to(root).as_posix(), field)]


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


def _read_file(file: Path, name: str, field: str) -> list[Document]:
    if not file.name.lower().endswith(SUPPORTED_ENDINGS):
        raise ValueError(f"unsupported file {file}; expected one ending in {_endings()}")
    if not file.is_file():
        raise ValueError(f"{file} is not a regular file")
    data = _decompressed(file)
    if file.name.lower().removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
        documents = list(_rows(file, name, data, field))
    else:
        documents = [Document(name, _normalised(_checked_text(file, data)))]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{file} holds no text: {'the file is empty' if not data else 'nothing but blanks'}")
    return documents


def _decompressed(file: Path) -> bytes:
    data = file.read_bytes()
    try:
        match file.suffix.lower():
            case ".gz":
                return gzip.decompress(data) if data else b""
            case ".xz":
                return lzma.decompress(data) if data else b""
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"{file} is not a complete {file.suffix.lower()} file: {error}") from error
    return data


def _checked_text(file: Path, data: bytes) -> bytes:
    """`data` if it is UTF-8 text; the offset in messages counts decompressed bytes."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{file} is not UTF-8 text: it starts with the byte order mark of UTF-16 at byte offset 0")
    if (at := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} is not text: NUL byte at byte offset {at}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 text: byte 0x{data[error.start]:02x} at byte offset {error.start} ({error.reason})"
        ) from error
    return data


def _normalised(data: bytes) -> bytes:
    return data.removeprefix(_BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _rows(file: Path, name: str, data: bytes, field: str) -> Iterator[Document]:
    lines = _checked_text(file, data).removeprefix(_BOM).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield Document(f"{name}:{number}", _row_text(f"{file}, line {number}", line, field))


def _row_text(place: str, line: bytes, field: str) -> bytes:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: malformed JSON: {error}") from error
    if (kind := _json_type(row)) != "an object":
        raise ValueError(f"{place}: expected a JSON object with the field {field!r}; got {kind}")
    if field not in row:
        raise ValueError(f"{place}: no field {field!r}; the row has {', '.join(map(repr, row)) or 'no fields'}")
    text = row[field]
    if (kind := _json_type(text)) != "a string":
        raise ValueError(f"{place}: field {field!r} must be a string; got {kind}")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: field {field!r} has an unpaired surrogate at character {error.start}") from error
    if b"\0" in encoded:
        raise ValueError(f"{place}: field {field!r} is not text: NUL at character {text.index(chr(0))}")
    return _normalised(encoded)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
