"""Loading a folder as a model: one parameter after the other, each straight to the devices that hold it."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from osdn_jax.interop.families import describe, family_of, own
from osdn_jax.interop.family import Family
from osdn_jax.interop.folder import Folder
from osdn_jax.interop.mapping import Shape
from osdn_jax.interop.origin import Origin
from osdn_jax.interop.plan import Plan, Source, grouped, match, summary
from osdn_jax.interop.safetensors import DTYPES
from osdn_jax.nn import MESH_AXES, CausalLM, ModelConfig, parameter_spec, split_model

MAX_LENGTH = 2048
"""Tokens that the caches of attention hold by default, if the model's own limit is not lower."""


class Opened(NamedTuple):
    """A folder whose headers were read and compared with what its model needs.

    Attributes:
        folder: the folder.
        family: the family of its model.
        config: the configuration of the model.
        shapes: {path: shape} of the model's parameters.
        plan: which tensors make which parameters, and what is wrong with them.
    """

    folder: Folder
    family: Family
    config: ModelConfig
    shapes: dict[str, Shape]
    plan: Plan


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    max_length: int | None = None,
    allow_nonfinite: bool = False,
    ignore_remote_code: bool = False,
) -> CausalLM:
    """Load a folder with config.json and safetensors files as a model.

    The tensors are read one after the other, and each parameter goes to its devices before the next one is read, so
    that memory holds the model and the tensors of one parameter. docs/interop.md lists the supported models.

    As for every `nn.CausalLM`, `model(ids)` returns (logits [B, T, vocabulary] in float32, states); `logits(model,
    ids)` returns the logits alone, from a compiled function. `model.origin` says where the model came from, which
    `save_pretrained` needs to write the same layout.

    Args:
        path: the folder, on this machine.
        dtype: dtype of all parameters and of the computation, float32 or bfloat16. Default: each parameter has the
            dtype of its tensors; the computation is in bfloat16 if the embedding is in 16 bits, else in float32.
        mesh: mesh with the axes `nn.MESH_AXES`; each device gets its part of the parameters, by `nn.parameter_spec`.
            Default: all parameters are on the default device. Call the model under `jax.set_mesh(mesh)`, as in
            training, or as it is, as in decoding; then the compiler partitions it.
        max_length: tokens that the caches of attention hold in decoding. Default: `max_position_embeddings` of the
            folder, at most 2048; for our own models, that of their configuration.
        allow_nonfinite: load tensors with NaN or infinities too. Default: False, an error that names them.
        ignore_remote_code: load a folder whose config.json names Python code to run (`auto_map`), with this
            package's implementation of the family. No code of a folder is ever run. Default: False, an error.

    Returns:
        The model.

    Raises:
        FileNotFoundError: the folder, its config.json, or weights are missing.
        ValueError: the model or one of its options is not supported; tensors are missing, extra or of a wrong shape
            (all are listed), malformed, quantised or not finite; or an argument is out of range.
        TypeError: an argument has another type.
        OSError: a file cannot be read.
    """
    opened = open_folder(path, max_length=max_length, ignore_remote_code=ignore_remote_code)
    if opened.plan.problems:
        raise ValueError(
            summary(opened.plan.problems, f"{opened.folder.path}: the tensors do not fit {opened.family.name}")
        )
    wanted = checked_dtype(dtype)
    mesh = _checked_mesh(mesh, opened.shapes)
    config = dataclasses.replace(opened.config, dtype=_computation(opened, wanted))
    arrays: dict[str, jax.Array] = {}
    bad: list[str] = []
    for source in opened.plan.sources:
        parameters, nonfinite = read_parameters(opened.folder, source)
        bad += nonfinite
        if bad and not allow_nonfinite:
            continue
        for name, value in parameters.items():
            arrays[name] = _placed(name, value.astype(_storage(value.dtype, wanted), copy=False), mesh)
    if bad and not allow_nonfinite:
        raise ValueError(
            summary(
                grouped(bad),
                f"{opened.folder.path}: NaN or infinities in the tensors (allow_nonfinite=True loads them)",
            )
        )
    model = assembled(config, arrays)
    model.origin = origin_of(opened)
    return model


def assembled(config: ModelConfig, parameters: Mapping[str, jax.Array]) -> CausalLM:
    """Return the model of a configuration with these parameters, without creating others.

    Args:
        config: the configuration.
        parameters: {path: array} of all parameters, as `nn.split_model` names them.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    flat = [(path, x.replace(parameters["/".join(map(str, path))])) for path, x in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nnx.GraphDef, state: Any, ids: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(ids)[0]


def logits(model: CausalLM, ids: ArrayLike) -> Float[Array, "B T Vocab"]:
    """Return the logits of the token after each token, from a compiled function.

    Args:
        model: a model, such as one of `load_pretrained`.
        ids: [B, T] token ids.

    Returns:
        [B, T, vocabulary] in float32; NaN for every token that can see an id outside the vocabulary.

    Raises:
        TypeError: `model` is no `nn.CausalLM`, or ids are not integers.
        ValueError: ids are not [B, T].
    """
    if not isinstance(model, CausalLM):
        raise TypeError(f"model: got {type(model).__name__}, expected a CausalLM")
    array = np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids: got {array.dtype}, expected integers")
    if array.ndim != 2:
        raise ValueError(f"ids: got shape {array.shape}, expected [B, T]")
    inside = (array >= 0) & (array < model.config.vocab_size)
    graph, state = nnx.split(model)
    return _logits(graph, state, jnp.asarray(np.where(inside, array, -1).astype(np.int32)))


def open_folder(
    path: str | os.PathLike[str], *, max_length: int | None = None, ignore_remote_code: bool = False
) -> Opened:
    """Read a folder's configuration and headers, and match its tensors with the parameters of its model.

    The arguments and errors are those of `load_pretrained`, except that tensors that do not fit are in the result.
    """
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ValueError(f"max_length: got {max_length!r}, expected an int of at least 1")
    folder = Folder(path, ignore_remote_code=ignore_remote_code)
    family = family_of(folder.config)
    config = describe(family, folder.config)
    if max_length is not None or family is not own.FAMILY:  # our own configurations have it
        config = config.with_max_length(max_length or _own_length(folder.config))
    shapes = parameter_shapes(config)
    found = {name: tensor.shape for name, tensor in folder.tensors.items()}
    rows = family.rows(config, folder.config, found.keys())
    return Opened(folder, family, config, shapes, match(rows, shapes, found, tuple(family.left_out)))


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return {path: shape} of the parameters of a configuration's model."""
    _, shapes = split_model(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    return {name: x.shape for name, x in shapes.items()}


def read_parameters(folder: Folder, source: Source) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the parameters of one row, {path: values}, and the names of tensors with values that are not finite.

    Raises:
        ValueError: a copy of a tensor differs from it.
    """
    bad: list[str] = []

    def read(names: Sequence[str]) -> list[np.ndarray]:
        values = [folder.tensors[name].read() for name in names]
        bad.extend(name for name, value in zip(names, values, strict=True) if not _is_finite(value))
        return values

    for name, copy in source.copies:
        if not np.array_equal(folder.tensors[name].read().view(np.uint8), folder.tensors[copy].read().view(np.uint8)):
            raise ValueError(f"{folder.path}: {copy} differs from {name}, expected the same values: they are tied")
    if source.row.experts is None:
        return source.row.load(_alike(read([name for [name] in source.names]))), bad
    parameters: dict[str, np.ndarray] = {}
    count, types = source.row.experts, {DTYPES[folder.tensors[name].type] for group in source.names for name in group}
    for expert, names in enumerate(zip(*source.names, strict=True)):  # one at a time, each into its place
        for name, value in source.row.load(read(names)).items():
            if expert == 0:
                dtype = value.dtype if len(types) == 1 else np.dtype(np.float32)
                parameters[name] = np.empty((count, *value.shape), dtype)
            parameters[name][expert] = value
    return parameters, bad


def _alike(tensors: list[np.ndarray]) -> list[np.ndarray]:
    """Return pieces of one parameter in one type; each fits into float32 without rounding."""
    if len({tensor.dtype for tensor in tensors}) == 1:
        return tensors
    return [tensor.astype(np.float32) for tensor in tensors]


def origin_of(opened: Opened) -> Origin:
    """Return what a model notes about the folder that it was loaded from."""
    names = [name for source in opened.plan.sources for group in source.names for name in group]
    names += [copy for source in opened.plan.sources for _, copy in source.copies]
    tensors = {name: (opened.folder.tensors[name].type, opened.folder.tensors[name].shape) for name in names}
    return Origin(
        opened.family.name,
        str(opened.folder.path.resolve()),
        opened.folder.text,
        tensors,
        tuple(opened.plan.left_out),
        dict(opened.folder.weights.metadata),
    )


def _is_finite(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all())


def checked_dtype(dtype: Any) -> np.dtype | None:
    """Return the dtype that an argument asks for, or None. Raises ValueError or TypeError."""
    if dtype is None:
        return None
    try:
        wanted = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"dtype: got {dtype!r}, expected float32, bfloat16 or None") from error
    if wanted not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype: got {wanted}, expected float32, bfloat16 or None")
    return wanted


def _storage(found: np.dtype, wanted: np.dtype | None) -> np.dtype:
    """Return the dtype of a parameter: the wanted one, or its own, of which JAX does not have float64 by default."""
    return wanted or (np.dtype(np.float32) if found.itemsize > 4 else found)


def _computation(opened: Opened, wanted: np.dtype | None) -> Any:
    if wanted is not None:
        return wanted.name
    source = next(source for source in opened.plan.sources if "embedding/embedding" in source.row.parameters)
    return "bfloat16" if DTYPES[opened.folder.tensors[source.names[0][0]].type].itemsize == 2 else "float32"


def _placed(name: str, value: np.ndarray, mesh: jax.sharding.Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(value)
    sharding = NamedSharding(mesh, _spec(name, value.shape, mesh))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _spec(name: str, shape: Shape, mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Return the spec of a parameter."""
    split = [axis for axis in ("tensor", "fsdp") if mesh.shape[axis] > 1]
    if name == "embedding/embedding" and len(split) == 2 and jax.__version_info__ < (0, 12):
        # XLA of jax 0.11 ends the process where it looks up rows of a table that is split along both of its axes.
        if shape[1] % math.prod(mesh.shape[axis] for axis in split) == 0:
            return PartitionSpec(None, tuple(split))
    return parameter_spec(name)


def _checked_mesh(mesh: jax.sharding.Mesh | None, shapes: Mapping[str, Shape]) -> jax.sharding.Mesh | None:
    """Return the mesh with Auto axes, so that the model also runs where no mesh is set, as in decoding.

    Raises TypeError or ValueError unless the mesh has the axes of models and divides every parameter.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh: got {type(mesh).__name__}, expected a jax.sharding.Mesh")
    if not set(MESH_AXES) <= set(mesh.axis_names):
        raise ValueError(f"mesh: got the axes {', '.join(mesh.axis_names)}, expected {', '.join(MESH_AXES)}")
    for name, shape in shapes.items():
        for size, axes in zip(shape, parameter_spec(name), strict=False):
            parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if size % parts:
                raise ValueError(f"mesh: got {parts} parts for an axis of {size} of {name}, expected a divisor of it")
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _own_length(config: Mapping[str, Any]) -> int:
    texts = config.get("text_config")
    values = texts if isinstance(texts, dict) else config
    lengths = [values.get(name) for name in ("max_position_embeddings", "model_max_length")]
    return min([MAX_LENGTH, *(length for length in lengths if type(length) is int and length > 0)])
