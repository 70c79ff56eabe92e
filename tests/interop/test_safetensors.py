"""The safetensors format: what is read is what was written, and every malformed file is one error that names it."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from osdn_jax.interop import safetensors as ours
from support.pretrained import TYPES, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("kind", ours.DTYPES)
def test_reads_every_type_of_weights(kind, tmp_path):
    values = {"a": np.arange(6).reshape(2, 3).astype(TYPES[kind]), "empty": np.zeros((0, 2), TYPES[kind])}
    write_safetensors(tmp_path / "x.safetensors", values)
    header = ours.read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    for name, value in values.items():
        got = header.tensors[name].read()
        assert got.dtype == value.dtype
        np.testing.assert_array_equal(got, value)


def test_the_library_reads_what_is_written(tmp_path):
    values = {
        "b": np.arange(3, dtype=np.float32),
        "a": np.ones((2, 1), TYPES["BF16"]),
        "c": np.float32(2.0).reshape(()),
    }
    tensors = [(name, x.shape, x.dtype) for name, x in values.items()]
    ours.write(tmp_path / "x.safetensors", tensors, values.__getitem__, {"format": "pt"})
    got = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert got.keys() == values.keys()
    for name, value in values.items():
        assert got[name].dtype == value.dtype
        np.testing.assert_array_equal(got[name], value)


def test_writing_checks_shapes_and_types(tmp_path):
    with pytest.raises(ValueError, match=r"a: got shape \(2,\), expected \(3,\)"):
        ours.write(tmp_path / "x", [("a", (3,), np.dtype("f4"))], lambda name: np.zeros(2, "f4"), {})
    with pytest.raises(ValueError, match="dtype: got int32"):
        ours.write(tmp_path / "x", [("a", (3,), np.dtype("i4"))], lambda name: np.zeros(3, "i4"), {})


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (b"", {"length": 10**6}, "truncated or of another format"),
        (b"{}", {"length": 2**63}, "truncated or of another format"),
        (b"not json", {}, "header is not JSON"),
        (b"\xff\xfe\xfd\xfc", {}, "header is not JSON"),
        (b"[" * 100_000, {}, "header is not JSON"),
        ([1], {}, "a header that is a list"),
        (b'{"a": 1, "a": 2}', {}, "'a' occurs twice"),
        ({"__metadata__": {"format": 1}}, {}, "__metadata__ is not"),
        ({"a": 1}, {}, "entry of 'a' is malformed"),
        ({"a": {"dtype": "F32", "shape": [2]}}, {}, "entry of 'a' is malformed"),
        ({"a": ENTRY | {"shape": [-2]}}, {}, "entry of 'a' is malformed"),
        ({"a": ENTRY | {"shape": [2.0]}}, {}, "entry of 'a' is malformed"),
        ({"a": ENTRY | {"shape": [1] * 100}}, {}, "entry of 'a' is malformed"),
        ({"a": ENTRY | {"shape": [10**4000]}}, {}, "entry of 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1' + b"0" * 9999 + b'], "data_offsets": [0, 8]}}', {}, "is not JSON"),
        ({"a": ENTRY | {"data_offsets": [0]}}, {}, "entry of 'a' is malformed"),
        ({"a": ENTRY | {"dtype": "F33"}}, {}, "type 'F33'"),
        ({"a": ENTRY | {"shape": [3]}}, {}, "'a' has 8 bytes, expected 12"),
        ({"a": ENTRY | {"shape": [2**40, 2**40]}}, {}, "'a' has 8 bytes, expected"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, {}, "'a' has -8 bytes"),
        ({"a": ENTRY}, {"data": b"\0" * 4}, "the file is truncated"),
        ({"a": ENTRY}, {"data": b"\0" * 12}, "expected .* where the last tensor ends"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, {"data": b"\0" * 12}, "overlaps 'a'"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, {"data": b"\0" * 20}, "gap after 'a'"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, {"data": b"\0" * 12}, "gap after the header"),
    ],
)
def test_malformed_files(header, options, message, tmp_path):
    file = raw(tmp_path / "bad.safetensors", header, **options)
    with pytest.raises(ValueError, match=message) as error:
        ours.read_header(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 7])
def test_files_that_are_too_short(data, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="truncated"):
        ours.read_header(tmp_path / "x")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    write_safetensors(tmp_path / "x", {"a": np.zeros(100, np.float32)})
    tensor = ours.read_header(tmp_path / "x").tensors["a"]
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-4])
    with pytest.raises(ValueError, match="changed meanwhile"):
        tensor.read()


def test_other_types_are_known_but_not_read(tmp_path):
    write_safetensors(tmp_path / "x", {"a": np.zeros(4, np.int64)})
    with pytest.raises(ValueError, match="type I64"):
        ours.read_header(tmp_path / "x").tensors["a"].read()
