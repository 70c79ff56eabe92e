"""States and prompt caches in files of the safetensors format.

The arrays of floating-point numbers are the file's tensors, named by their place in the state; integers are in the
header, with the fingerprint of the model.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from osdn_jax._files import file_path, replacing
from osdn_jax.generation import arguments
from osdn_jax.generation.fingerprints import Fingerprint, fingerprint
from osdn_jax.generation.model import Model
from osdn_jax.generation.prompt_cache import PromptCache
from osdn_jax.generation.states import GenerationState, is_cache

_FORMAT = "osdn-jax generation state 1"
_WHAT = {
    "config": "of another configuration",
    "shapes": "whose parameters have other names or shapes",
    "weights": "with other weights",
}


def write_state(path: str | os.PathLike[str], state: GenerationState | PromptCache, model: Model) -> None:
    """Write a state or a prompt cache. `Generator.save_state` documents arguments and errors."""
    from osdn_jax.interop import safetensors

    path = file_path("path", path)
    if isinstance(state, PromptCache):
        if state.model is not model and _fingerprint(state.model) != _fingerprint(model):
            raise ValueError("state: got the prompt cache of another model, expected one of this model")
        trees = {"last": state.last, **{f"kept/{place}": blocks for place, blocks in state.kept.items()}}
        about: dict[str, Any] = {"tokens": state.tokens.tolist(), "keep_every": state.keep_every, "rows": 1}
    else:
        rows = model.check(state)
        trees = {"last": state.blocks}
        seen = [np.flatnonzero(row).tolist() for row in np.asarray(state.seen)]
        about = {"token": np.asarray(state.token).tolist(), "length": np.asarray(state.length).tolist()}
        about |= {"rows": rows, "seen": seen}
    arrays = {f"{tree}{name}": x for tree, blocks in trees.items() for name, x in _named(blocks).items()}
    floats = {name: x for name, x in arrays.items() if np.dtype(x.dtype).kind not in "iub"}
    about["integers"] = {name: np.asarray(x).tolist() for name, x in arrays.items() if name not in floats}
    metadata = {"format": _FORMAT, "about": json.dumps(about, separators=(",", ":"))}
    metadata |= {f"model_{name}": value for name, value in _fingerprint(model)._asdict().items()}
    metadata["checksum"] = _checksum(metadata["about"], ((name, np.asarray(x)) for name, x in floats.items()))
    tensors = [(name, tuple(x.shape), np.dtype(x.dtype)) for name, x in floats.items()]
    with replacing(path) as place:
        safetensors.write(place, tensors, lambda name: np.asarray(floats[name]), metadata)


def read_state(path: str | os.PathLike[str], model: Model) -> GenerationState | PromptCache:
    """Return the state or prompt cache of a file. `Generator.load_state` documents arguments and errors."""
    from osdn_jax.interop import safetensors

    path = file_path("path", path)
    header = safetensors.read_header(path)
    if header.metadata.get("format") != _FORMAT:
        got = header.metadata.get("format")
        raise ValueError(f"{path}: got a file of the format {got!r}, expected {_FORMAT!r}")
    for name, value in _fingerprint(model)._asdict().items():
        if header.metadata.get(f"model_{name}") != value:
            raise ValueError(f"{path}: got the state of a model {_WHAT[name]}, expected one of this model")
    try:
        text = header.metadata["about"]
        values = {name: tensor.read() for name, tensor in header.tensors.items()}
        if header.metadata["checksum"] != _checksum(text, values.items()):
            raise ValueError("its content differs from what was written (checksum)")
        return _state(json.loads(text), values.__getitem__, model)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: the state is malformed: {type(error).__name__}: {error}") from error


def _state(about: dict[str, Any], tensor: Callable[[str], np.ndarray], model: Model) -> GenerationState | PromptCache:
    rows, integers = about["rows"], about["integers"]
    template = model.start_shapes(rows)

    def blocks(tree: str, template: Any) -> Any:
        def leaf(path: Any, shape: Any) -> Any:
            name = tree + jax.tree_util.keystr(path)
            if np.dtype(shape.dtype).kind in "iub":
                return jax.numpy.asarray(np.asarray(integers[name], shape.dtype))
            return jax.numpy.asarray(tensor(name).astype(shape.dtype))

        return jax.tree.map_with_path(leaf, template)

    last = blocks("last", template)
    model.check_blocks(last, rows)
    if "keep_every" in about:
        every = arguments.at_least_one("keep_every", about["keep_every"])
        tokens = arguments.tokens("tokens", about["tokens"], model.vocabulary)
        kept = {}
        for place in range(0, len(tokens), every):
            tree = f"kept/{place}"
            kept[place] = blocks(tree, _kept_template(template, tree, integers))
        return PromptCache(model, tokens, every, kept, last)
    seen = np.zeros((rows, model.vocabulary), bool)
    for row, ids in enumerate(about["seen"]):
        seen[row, ids] = True
    token, length = (np.asarray(about[name], np.int32) for name in ("token", "length"))
    state = GenerationState(last, token, seen, length)  # type: ignore[arg-type]  # NumPy arrays
    model.check(state)
    return state


def _checksum(about: str, values: Iterable[tuple[str, np.ndarray]]) -> str:
    """Return a checksum of the content of a file: of what the header says of the state, and of all tensors."""
    found = zlib.crc32(about.encode())
    for name, value in values:
        found = zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8), zlib.crc32(name.encode(), found))
    return f"crc32:{found:08x}"


def _kept_template(template: Any, tree: str, integers: dict[str, Any]) -> Any:
    """Return the shapes of a kept state, without the caches that the file has only once."""

    def at_node(path: Any, node: Any) -> Any:
        left_out = is_cache(node) and f"{tree}{jax.tree_util.keystr(path)}.position" not in integers
        return None if left_out else node

    return jax.tree.map_with_path(at_node, template, is_leaf=is_cache)


def _named(blocks: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(blocks)}


def _fingerprint(model: Model) -> Fingerprint:
    return fingerprint(model.config, model.parameters)
