"""Saving a model as a folder: in the layout that it came from, in a layout that is named, or in our own."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from osdn_jax.interop import safetensors
from osdn_jax.interop.comparison import normal_mixer
from osdn_jax.interop.families import FAMILIES, own
from osdn_jax.interop.family import Family
from osdn_jax.interop.folder import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, is_run
from osdn_jax.interop.loading import checked_dtype, parameter_shapes
from osdn_jax.interop.mapping import Shape
from osdn_jax.interop.origin import Origin
from osdn_jax.interop.paths import free_folder
from osdn_jax.interop.placing import placed
from osdn_jax.interop.plan import Source, match
from osdn_jax.nn import CausalLM, ModelConfig, split_model

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files next to the weights that are copied along."""

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "initializer_range")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


class _Target(NamedTuple):
    """The folder to write: its family, config.json, the tensors of each row, and the type of each tensor."""

    family: Family
    config: str
    sources: list[Source]
    types: Mapping[str, str]
    metadata: Mapping[str, str]


def save_pretrained(
    model: CausalLM,
    path: str | os.PathLike[str],
    *,
    layout: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> str:
    """Save a model as a folder with config.json and safetensors files.

    A new folder appears when it is complete; one that is overwritten is as it was before if saving fails. A model of
    `load_pretrained` gets the config.json, the names, shapes and dtypes of the tensors of the folder that it came from,
    so that the library that wrote that folder reads this one; its tokenizer, generation settings and chat template are
    copied along, if that folder is still there. If the model's rule has been changed since, or it never had another
    layout, it is saved in our own, "osdn_jax": config.json holds the fields of its `nn.ModelConfig`, and the tensors
    have the names of our parameters.

    Args:
        model: the model.
        path: the new folder; folders above it are created too, and a link is followed.
        layout: family whose layout is written, a key of `FAMILIES`, such as "gated_deltanet" or "osdn_jax". Default:
            chosen as above.
        dtype: dtype of all tensors, float32 or bfloat16. Default: that of each tensor where the model was loaded from,
            else that of each parameter.
        max_shard_bytes: bytes of tensors in one file; more are split over several files with an index. Default: 5 GB.
        overwrite: replace a model that is there already: its config.json and its weights. Other files stay. Default:
            False, an error if the folder is not empty.

    Returns:
        The layout that was written.

    Raises:
        FileExistsError: the folder is not empty, and `overwrite` is False; it is the working directory of a run; or
            `path`, or part of it, is a file.
        ValueError: the path is no folder of this machine; the layout is unknown or cannot hold this model; part of the
            original folder was not loaded, so that its layout cannot be written; parameters are on other processes; or
            an argument is out of range.
        TypeError: `model` is no `nn.CausalLM`, or `path` no path.
        OSError: the folder cannot be written.
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"model: got {type(model).__name__}, expected a CausalLM")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes!r}, expected an int of at least 1")
    parameters = split_model(model)[1]
    remote = [name for name, x in parameters.items() if isinstance(x, jax.Array) and not x.is_fully_addressable]
    if remote:
        raise ValueError(f"model: {remote[0]} is partly on other processes, expected all parameters on this one")
    folder = free_folder(path, overwrite=overwrite)
    if is_run(folder):
        raise FileExistsError(f"path: got {str(folder)!r}, the working directory of a run; expected another folder")
    origin = getattr(model, "origin", None)
    target = _target(model.config, origin, layout, {name: np.dtype(x.dtype) for name, x in parameters.items()})
    wanted = checked_dtype(dtype)
    with placed(folder, replaced=_WEIGHTS, last=CONFIG_FILE) as new:
        _write_weights(new, target, parameters, wanted, max_shard_bytes)
        (new / CONFIG_FILE).write_text(target.config if wanted is None else _with_dtype(target.config, wanted))
        if origin is not None:
            for name in COMPANIONS:
                if (Path(origin.folder) / name).is_file():
                    shutil.copyfile(Path(origin.folder) / name, new / name)
    return target.family.name


def _target(config: ModelConfig, origin: Origin | None, layout: str | None, dtypes: Mapping[str, np.dtype]) -> _Target:
    if layout is not None and layout not in FAMILIES:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(FAMILIES)}")
    if origin is not None and layout in (None, origin.family):
        family, entries = FAMILIES[origin.family], json.loads(origin.config)
        same = not differences(family.describe(entries), config)
        if same and origin.left_out and layout is None:
            raise ValueError(
                f"model: {len(origin.left_out)} tensors of {origin.folder} were not loaded, such as "
                f"{origin.left_out[0]}, so that folder cannot be written again; layout={family.name!r} or "
                f"{own.MODEL_TYPE!r} saves what was loaded"
            )
        if same and not origin.left_out:
            found = {name: shape for name, (_, shape) in origin.tensors.items()}
            sources = _sources(family, config, entries, found)
            types = {name: kind for name, (kind, _) in origin.tensors.items()}
            return _Target(family, origin.config, sources, types, origin.metadata)
    family = FAMILIES[layout or own.MODEL_TYPE]
    if family.express is None:
        raise ValueError(f"layout: got {layout!r}, expected the layout of the model's own folder or {own.MODEL_TYPE!r}")
    try:
        entries = family.express(config)
        changed = differences(family.describe(entries), config)
    except ValueError as error:
        changed = [str(error)]
    if changed:
        raise ValueError(f"layout: {family.name!r} cannot hold this model: {'; '.join(changed)}")
    sources = _sources(family, config, entries, {})
    types = {
        name: safetensors.type_name(np.result_type(*(dtypes[path] for path in source.row.parameters)))
        for source in sources
        for group in source.names
        for name in group
    }
    entries = {
        "dtype": dtypes["embedding/embedding"].name,
        **entries,
        **_kept(origin),
    }
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
    return _Target(family, text, sources, types, {"format": "pt"})


def _kept(origin: Origin | None) -> dict[str, Any]:
    """Return the entries of the original config.json that say nothing about the tensors, for another layout."""
    values = {} if origin is None else json.loads(origin.config)
    values |= values.get("text_config") or {}
    return {name: values[name] for name in _KEPT if values.get(name) is not None}


def _sources(
    family: Family, config: ModelConfig, entries: Mapping[str, Any], found: Mapping[str, Shape]
) -> list[Source]:
    return match(family.rows(config, entries, found.keys()), parameter_shapes(config), found).sources


def differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Return the fields in which two configurations differ, except those that change no logits, as "field: x, y"."""
    left, right = (_flat(dataclasses.asdict(_normal(config))) for config in (a, b))
    names = sorted(left.keys() | right.keys())
    return [f"{name}: {left.get(name)!r}, {right.get(name)!r}" for name in names if left.get(name) != right.get(name)]


def _normal(config: ModelConfig) -> ModelConfig:
    """Return a configuration as blocks, with one value for the fields that change no logits."""
    config = config.with_max_length(1)
    return ModelConfig(
        config.vocab_size,
        blocks=tuple(dataclasses.replace(block, mixer=normal_mixer(block.mixer)) for block in config.stack),
        tied_embeddings=config.tied_embeddings,
        norm_epsilon=config.norm_epsilon,
        norm_offset=config.norm_offset,
    )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of nested dicts and of lists of dicts."""
    if isinstance(values, tuple | list) and any(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _write_weights(
    folder: Path, target: _Target, parameters: Mapping[str, Any], wanted: np.dtype | None, max_shard_bytes: int
) -> None:
    """Write the safetensors files, and the index if there are several."""
    shards: list[list[tuple[str, Shape, np.dtype]]] = []
    sizes: list[int] = []
    for source in target.sources:
        tensors = [(name, shape) for group, shape in zip(source.names, source.shapes, strict=True) for name in group]
        tensors += [(copy, next(shape for name, shape in tensors if name == of)) for of, copy in source.copies]
        for name, shape in tensors:
            dtype = wanted or safetensors.DTYPES[target.types[name]]
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            if not shards or (sizes[-1] and sizes[-1] + size > max_shard_bytes):
                shards.append([])
                sizes.append(0)
            shards[-1].append((name, shape, dtype))
            sizes[-1] += size
    values = _Values(target.sources, parameters)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors_of_file in zip(names, shards, strict=True):
        safetensors.write(folder / name, tensors_of_file, values.__getitem__, target.metadata)
    if len(shards) > 1:
        places = {tensor: name for name, file in zip(names, shards, strict=True) for tensor, _, _ in file}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


class _Values:
    """The values of tensors, computed for one row at a time."""

    def __init__(self, sources: list[Source], parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self._source = {name: source for source in sources for group in source.names for name in group}
        self._source |= {copy: source for source in sources for _, copy in source.copies}
        self._current: Source | None = None
        self._values: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        source = self._source[name]
        if source is not self._current:
            self._values.clear()
            arrays = {path: np.asarray(self._parameters[path]) for path in source.row.parameters}
            for group, array in zip(source.names, source.row.save(arrays, source.shapes), strict=True):
                self._values |= dict(zip(group, [array] if source.row.experts is None else array, strict=True))
            self._values |= {copy: self._values[of] for of, copy in source.copies}
            self._current = source
        return self._values[name]


def _with_dtype(text: str, dtype: np.dtype) -> str:
    """Return a config.json with another dtype."""
    entries = json.loads(text)
    for values in (entries, entries.get("text_config", {})):
        for name in ("dtype", "torch_dtype"):
            if name in values:
                values[name] = dtype.name
    return json.dumps(entries, indent=2) + "\n"
