"""Folders of safetensors files, written and read without the package."""

import json
import struct

import ml_dtypes
import numpy as np

TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64, "I64": np.int64}
TYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn}
NAMES = {np.dtype(dtype): name for name, dtype in TYPES.items()}


def write_safetensors(path, tensors, metadata=None):
    """Write {name: array} in the format of https://github.com/huggingface/safetensors, without the library."""
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    """Return {name: array} of a file, read without the package."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_folder(folder):
    """Return {name: array} of all files of a folder."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in read_safetensors(file).items()}


def write_folder(folder, config, tensors, *, shards=1):
    """Write a folder with config.json and the tensors in one file, or in several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_safetensors(folder / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
