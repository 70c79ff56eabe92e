"""A folder with a model as other libraries save it: its configuration, and where each of its tensors lies."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osdn_jax._files import naming_the_file
from osdn_jax.interop.paths import existing_folder
from osdn_jax.interop.plan import summary
from osdn_jax.interop.safetensors import DTYPES, Tensor, read_header

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_JSON = 1 << 28  # bytes
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "*.pt", "*.pth", "*.bin", "*.ckpt", "*.pkl")
_REMOTE_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


IGNORE_REMOTE_CODE = "load a folder whose config.json names Python code, without running that code"
"""Help text of the flag of every command line that reads a folder."""


class Folder:
    """The configuration and the tensors of a folder; opening one reads headers only.

    Args:
        path: the folder.
        ignore_remote_code: read a config.json that names code to run, without running it.

    Attributes:
        path: the folder.
        config: the entries of config.json.
        text: config.json as it is.
        weights: the tensors.

    Raises:
        FileNotFoundError: no folder, no config.json, no weights, or a file of the index is missing.
        ValueError: malformed files; weights as pickles only; a config that asks for remote code; quantised weights. All
            problems of the weights are listed.
    """

    def __init__(self, path: str | os.PathLike[str], *, ignore_remote_code: bool = False) -> None:
        """Read the configuration, the index and the headers."""
        self.path = existing_folder(path)
        self.text, self.config = read_config(self.path)
        problems = unserved(self.path / CONFIG_FILE, self.config, ignore_remote_code=ignore_remote_code)
        if problems:
            raise ValueError("; ".join(problems))
        self.weights = read_weights(self.path)
        if self.weights.problems:
            raise _joined(self.path, self.weights.problems)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return {name: where it lies}."""
        return self.weights.tensors


@dataclasses.dataclass
class Weights:
    """The tensors of a folder.

    Args:
        tensors: {name: where it lies}.
        files: the safetensors files.
        metadata: the metadata of the first of them.
        problems: the errors of files that cannot be read as they are.
    """

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    files: list[Path] = dataclasses.field(default_factory=list)
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[Exception] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())


def read_weights(folder: Path) -> Weights:
    """Read the index and all headers of a folder, and note every problem."""
    weights = Weights()
    index = folder / INDEX_FILE
    try:
        files = _indexed_files(index) if index.is_file() else {_single_file(folder): None}
    except (ValueError, OSError) as error:
        weights.problems.append(error)
        return weights
    for file, expected in files.items():
        weights.files.append(file)
        try:
            header = read_header(file)
            _check_indexed(file, header.tensors, expected)
        except (ValueError, OSError) as error:
            weights.problems.append(error)
            continue
        weights.metadata = weights.metadata or header.metadata
        for name, tensor in header.tensors.items():
            if name in weights.tensors:
                other = weights.tensors[name].file.name
                weights.problems.append(ValueError(f"{file}: has the key {name!r}, which {other} has too"))
            weights.tensors[name] = tensor
    weights.problems += _wrong_types(weights.tensors)
    return weights


def _single_file(folder: Path) -> Path:
    """Return the safetensors file of a folder without an index."""
    file = folder / SINGLE_FILE
    if file.is_file():
        return file
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        names = ", ".join(other.name for other in others[:3]) + (", …" if len(others) > 3 else "")
        raise FileNotFoundError(f"{folder}: got {names} without {INDEX_FILE}, expected it or {SINGLE_FILE}")
    pickles = sorted({file.name for pattern in _PICKLES for file in folder.glob(pattern)})
    if pickles:
        raise ValueError(
            f"{folder}: got weights in {pickles[0]} only, a pickle, which can run code and is never opened; "
            "expected safetensors files: save the model again with save_pretrained of its library"
        )
    raise FileNotFoundError(f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}")


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a folder's config.json and its entries."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: has no {CONFIG_FILE}; expected a folder that a save_pretrained wrote")
    return read_json(file)


def read_json(file: Path) -> tuple[str, dict[str, Any]]:
    """Return the text of a file and the JSON object in it. Raises ValueError if it is none."""
    with naming_the_file(file):
        if file.stat().st_size > _MAX_JSON:
            raise ValueError(f"{file}: got {file.stat().st_size:,} bytes, expected at most {_MAX_JSON:,}")
        data = file.read_bytes()
    try:
        text = data.decode("utf-8")
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: got a JSON {type(values).__name__}, expected an object")
    return text, values


def unserved(file: Path, config: Mapping[str, Any], *, ignore_remote_code: bool) -> list[str]:
    """Return a line for each reason in config.json not to load the folder: code to run, quantised weights, a run."""
    problems = []
    if _is_config_of_run(file.parent, config):
        problems.append(
            f"{file.parent}: is the working directory of a run of train.py, expected a folder that "
            "python -m osdn_jax.convert makes of it"
        )
    places = {"": config} | {f"{key}.": value for key, value in config.items() if isinstance(value, dict)}
    for prefix, values in places.items():
        for name in _REMOTE_CODE:
            if values.get(name) and not ignore_remote_code:
                problems.append(
                    f"{file}: got {prefix}{name}, which asks to run code that is not part of this package; none was "
                    "run. If the model is of a supported family, ignore_remote_code=True loads it without that code"
                )
        if values.get("quantization_config"):
            problems.append(f"{file}: got {prefix}quantization_config, expected weights that are not quantised")
    return problems


def is_run(folder: Path) -> bool:
    """Return whether a folder is the working directory of a run of train.py, whose config.json is not a model's."""
    try:
        return _is_config_of_run(folder, read_config(folder)[1])
    except (ValueError, OSError):
        return False


def _is_config_of_run(folder: Path, config: Mapping[str, Any]) -> bool:
    return "model_type" not in config and (folder / "checkpoints").is_dir()


def _indexed_files(index: Path) -> dict[Path, set[str] | None]:
    """Return {file: the keys that the index puts there}."""
    _, values = read_json(index)
    places = values.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: got no weight_map, expected an object from keys to files")
    files: dict[Path, set[str] | None] = {}
    for key, name in places.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{index}: got {name!r} as the file of {key!r}, expected the name of a file")
        file = index.parent / name
        if _is_outside(index.parent, name):
            raise ValueError(f"{index}: got the file {name!r} of {key!r}, which lies outside the folder")
        if not name.endswith(".safetensors"):
            raise ValueError(f"{index}: got the file {name!r} of {key!r}, expected a safetensors file")
        keys = files.setdefault(file, set())
        if keys is not None:
            keys.add(key)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index}: names the file {file.name!r}, which does not exist")
    return files


def _is_outside(folder: Path, name: str) -> bool:
    """Return whether a file of an index lies outside the folder, also by a link.

    In the cache of the Hugging Face hub, a folder snapshots/REVISION holds links to files in blobs, which are allowed.
    """
    if os.path.isabs(name) or ".." in Path(name).parts:
        return True
    try:
        file, inside = (folder / name).resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, or a NUL character
        return True
    blobs = inside.parent.parent / "blobs"
    return not (file.is_relative_to(inside) or (inside.parent.name == "snapshots" and file.parent == blobs))


def _check_indexed(file: Path, found: Mapping[str, Tensor], expected: set[str] | None) -> None:
    lacking = sorted((expected or set()) - set(found))
    if lacking:
        raise ValueError(f"{file}: lacks {_several(lacking)}, which {INDEX_FILE} puts there")


def _wrong_types(tensors: Mapping[str, Tensor]) -> list[Exception]:
    wrong: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.type not in DTYPES:
            wrong.setdefault(tensor.type, []).append(name)
    known = ", ".join(DTYPES)
    return [
        ValueError(f"{_several(names)}: got the type {kind}, expected one of {known}: quantised weights are not read")
        for kind, names in wrong.items()
    ]


def _joined(folder: Path, problems: list[Exception]) -> Exception:
    """Return one error for all problems."""
    if len(problems) == 1:
        return problems[0]
    return ValueError(summary([str(problem) for problem in problems], f"{folder}: {len(problems)} problems"))


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more keys"
