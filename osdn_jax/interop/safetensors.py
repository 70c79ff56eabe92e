"""The safetensors format: a header that is checked in full before anything is read, and tensors read one at a time."""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from osdn_jax._errors import printable
from osdn_jax._files import naming_the_file

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
"""{name of a type in a header: its NumPy dtype}, the types of weights that can be read."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits of the types that the format has and weights here must not: integers, and the 8-bit floats of quantised models.
_OTHER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
_OTHER_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_AXES = 32
_METADATA = "__metadata__"


class Tensor(NamedTuple):
    """The place of a tensor in a file.

    Attributes:
        file: the safetensors file.
        type: its name in the header, such as "BF16".
        shape: its shape.
        start: offset of its first byte in the file.
        size: bytes.
    """

    file: Path
    type: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> np.ndarray:
        """Return the values, in their own dtype. Raises ValueError for a type that is not in `DTYPES`."""
        if self.type not in DTYPES:
            raise ValueError(f"{self.file}: got a tensor of type {self.type}, expected one of {', '.join(DTYPES)}")
        values = np.empty(self.shape, DTYPES[self.type])
        with naming_the_file(self.file), open(self.file, "rb") as file:
            file.seek(self.start)
            if file.readinto(values.reshape(-1).view(np.uint8)) != self.size:
                raise ValueError(f"{self.file}: got fewer bytes than when it was opened; it was changed meanwhile")
        return values


class Header(NamedTuple):
    """The header of a file.

    Attributes:
        tensors: {name: where it lies}, in the order of the file.
        metadata: the header's `__metadata__`, such as {"format": "pt"}.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Args:
        path: the file.

    Raises:
        ValueError: the file is truncated or malformed; the message names the file and what is wrong.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with naming_the_file(path):
        if not path.is_file():  # opening a pipe would wait for its writer
            raise FileNotFoundError(errno.ENOENT, "No such file", str(path))
        total = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(total - 8, _MAX_HEADER):
                raise ValueError(
                    f"{path}: got {total:,} bytes of which the first 8 give a header of {length:,}; expected a "
                    "safetensors file: this one is truncated or of another format"
                )
            text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: got a header that is a {type(entries).__name__}, expected a JSON object")
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: {_METADATA} is not an object of strings")
    tensors = {name: _tensor(path, name, entry, 8 + length, total) for name, entry in entries.items()}
    _check_layout(path, tensors, 8 + length, total)
    return Header(tensors, metadata)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict. Raises ValueError for a key that occurs twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key '{printable(name)}' occurs twice")
        found[name] = value
    return found


def _tensor(path: Path, name: str, entry: Any, start: int, total: int) -> Tensor:
    shown = f"'{printable(name)}'"
    problem = ValueError(f"{path}: the header's entry of {shown} is malformed: {entry!r:.200}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise problem
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(kind, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise problem
    if kind not in DTYPES and kind not in _OTHER_BITS:
        raise ValueError(f"{path}: {shown} has the type {kind!r:.40}, which safetensors does not have")
    bits = 8 * DTYPES[kind].itemsize if kind in DTYPES else _OTHER_BITS[kind]
    elements = 1
    for size in shape:
        elements *= size
    first, last = offsets
    if 8 * (last - first) != elements * bits:
        raise ValueError(
            f"{path}: {shown} has {last - first:,} bytes, expected {elements * bits // 8:,} for {kind} {shape}"
        )
    if start + last > total:
        raise ValueError(
            f"{path}: {shown} ends at byte {start + last:,} of {total:,}: the file is truncated or its header wrong"
        )
    return Tensor(path, kind, tuple(shape), start + first, last - first)


def _are_sizes(values: Any) -> bool:
    if not isinstance(values, list) or len(values) > _MAX_AXES:
        return False
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path: Path, tensors: dict[str, Tensor], start: int, total: int) -> None:
    """Raise ValueError unless the tensors fill the file without gaps and do not overlap."""
    end, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        shown = f"'{printable(name)}'"
        if tensor.start != end:
            what = "overlaps" if tensor.start < end else "leaves a gap after"
            raise ValueError(f"{path}: {shown} starts at byte {tensor.start:,} and {what} {before}, expected {end:,}")
        end, before = tensor.start + tensor.size, shown
    if end != total:
        raise ValueError(f"{path}: got {total:,} bytes, expected {end:,}, where the last tensor ends")


def write(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]],
    values: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, holding one tensor in memory at a time.

    Args:
        path: the file, which is replaced if it exists.
        tensors: (name, shape, dtype) of each.
        values: function from the name to the values, which are rounded to the dtype.
        metadata: the header's `__metadata__`.

    Raises:
        ValueError: values of another shape, or a dtype that is not in `DTYPES`.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    tensors, offset = list(tensors), 0
    for name, shape, dtype in tensors:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": type_name(dtype), "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
    with naming_the_file(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, dtype in tensors:
            value = np.asarray(values(name), dtype, order="C")
            if value.shape != tuple(shape):
                raise ValueError(f"{name}: got shape {value.shape}, expected {tuple(shape)}")
            file.write(value.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def type_name(dtype: np.dtype) -> str:
    """Return the name of a dtype in a header. Raises ValueError for a dtype that is not in `DTYPES`."""
    if dtype not in _NAMES:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]
