"""The mesh of a run, with the axes data, fsdp, tensor and context, and the shardings of its arrays."""

import contextlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from osdn_jax.data import Window
from osdn_jax.nn import MixtureConfig
from osdn_jax.nn.config import TRANSFORMER
from osdn_jax.nn.sharding import AXIS_RULES, MESH_AXES, parameter_spec, spec
from osdn_jax.training.model_config import build_model_config
from osdn_jax.training.ranges import check_ranges

PyTree = Any


def build_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh | None:
    """Return the mesh of a run, or None for a single device.

    Args:
        config: of the run; one of the sizes in config.mesh may be -1: all remaining devices.
        devices: default: all.

    Raises:
        ValueError: the product of the sizes does not match the devices, or a size does not divide what it shards: the
            batch, the tokens of a window, the model's width, heads or hidden units. The vocabulary is often the
            tokenizer's, which is not read here: see `Layout.check_vocabulary`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    count = math.prod(sizes.values())
    check_divisible(config, sizes)
    if count == 1:
        return None
    return jax.make_mesh(tuple(sizes.values()), MESH_AXES, (AxisType.Auto,) * 4, devices=devices[:count])


def mesh_sizes(config: ConfigDict, devices: int) -> dict[str, int]:
    """Return {axis: size} with -1 replaced. Raises ValueError as `build_mesh`."""
    sizes = {axis: int(config.mesh[axis]) for axis in MESH_AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis}: got {size}, expected at least 1, or -1 for all devices that are left")
    if len(open_axes) > 1:
        raise ValueError(f"mesh: got -1 for {' and '.join(open_axes)}, expected it for one axis at most")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes:
        if devices % fixed:
            raise ValueError(f"mesh: got {_product(sizes)}, expected a product that divides the {devices} devices here")
        sizes[open_axes[0]] = devices // fixed
    count = math.prod(sizes.values())
    if count > devices or (jax.process_count() > 1 and count != devices):
        raise ValueError(f"mesh: got {_product(sizes)}, {count} in all, expected the {devices} devices here")
    return sizes


def check_divisible(config: ConfigDict, sizes: Mapping[str, int]) -> None:
    """Raise ValueError, naming the key, if a mesh of these sizes does not divide what it shards."""
    check_ranges(config, "accumulate")  # before dividing by it
    rows = ("mesh.data × mesh.fsdp", sizes["data"] * sizes["fsdp"])
    columns = ("mesh.context × mesh.tensor", sizes["context"] * sizes["tensor"])
    width = ("mesh.fsdp × mesh.tensor", sizes["fsdp"] * sizes["tensor"])
    tensor = ("mesh.tensor", sizes["tensor"])
    fsdp = ("mesh.fsdp", sizes["fsdp"])
    wanted = [
        ("batch_size / accumulate", config.batch_size // config.accumulate, rows),
        ("validation.batch_size", config.validation.batch_size, rows),
        ("sequence_length", config.sequence_length, columns),
        ("validation.sequence_length", config.validation.sequence_length, columns),
        *_sizes_of_the_model(config, width, tensor, fsdp),
    ]
    for key, value, (name, size) in wanted:
        if value % size:
            raise ValueError(f"{key}: got {value}, expected a multiple of {name} = {size}")
    taps = _conv_size(config)
    if taps == 0 or sizes["context"] == 1:
        return
    needed = (taps - 1) * sizes["context"]
    for key, value in (
        ("sequence_length", config.sequence_length),
        ("validation.sequence_length", config.validation.sequence_length),
    ):
        if value < needed:
            raise ValueError(
                f"{key}: got {value}, expected at least {needed} over mesh.context = {sizes['context']}: the "
                f"convolution reads model.conv_size - 1 = {taps - 1} tokens of the device before"
            )


def _sizes_of_the_model(
    config: ConfigDict, width: tuple[str, int], tensor: tuple[str, int], fsdp: tuple[str, int]
) -> list[tuple[str, int, tuple[str, int]]]:
    """Return (key, size, (mesh axes, their size)) of what the mesh divides in the model."""
    model = config.model
    if model.stack is not None:
        made = build_model_config(config)
        found = {("the model's width", made.width, width)}
        for block, _ in made.counted:
            found.add(("the model's heads", block.mixer.heads, tensor))
            found.add(("the rank of the model's queries", getattr(block.mixer, "query_rank", None) or 0, fsdp))
            found.add(("the model's key heads", getattr(block.mixer, "num_key_heads", block.mixer.heads), tensor))
            if isinstance(block.mlp, MixtureConfig):
                found.add(("the model's experts", block.mlp.experts, tensor))
                found.add(("the model's shared experts", block.mlp.shared_hidden, tensor))
            else:
                found.add(("the model's MLPs", block.mlp.hidden, tensor))
        return sorted(found)
    wanted = [
        ("model.width", model.width, width),
        ("model.heads", model.heads, tensor),
        ("model.key_heads", model.key_heads or model.heads, tensor),
        ("model.mlp_dim", model.mlp_dim, tensor),
    ]
    if model.attention_every is not None:
        heads = model.attention_heads or model.heads
        wanted += [("model.attention_heads", heads, tensor)]
        wanted += [("model.attention_key_heads", model.attention_key_heads or heads, tensor)]
    if model.experts is not None:
        wanted += [("model.experts", model.experts, tensor)]
        wanted += [("model.shared_expert_dim", model.shared_expert_dim, tensor)]
    return wanted


def _conv_size(config: ConfigDict) -> int:
    """Return the taps of the longest short convolution; 0 for a model without one."""
    model = config.model
    if model.stack is not None:
        return max(getattr(block.mixer, "conv_size", 0) for block, _ in build_model_config(config).counted)
    return 0 if model.rule == TRANSFORMER else int(model.conv_size)


def describe(mesh: Mesh | None) -> str:
    """Return a description of the mesh: "8 devices (2 data x 4 context)"."""
    device = jax.devices()[0].device_kind
    if mesh is None:
        return f"1 of {jax.device_count()} {device} devices" if jax.device_count() > 1 else f"1 {device} device"
    return f"{mesh.size} {device} devices ({_product({axis: n for axis, n in mesh.shape.items() if n > 1})})"


class Layout:
    """The placement of a run's arrays on a mesh; without a mesh, everything is on the first device."""

    def __init__(self, mesh: Mesh | None) -> None:
        """Take a mesh of `build_mesh`. Raises ValueError if it gives processes unequal shares of a batch."""
        self.mesh = mesh
        self.share = _share(mesh)  # (index, count): this process reads block `index` of `count` equal blocks of rows

    @property
    def devices(self) -> int:
        """The number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    def check_vocabulary(self, size: int, *, given: bool) -> None:
        """Raise ValueError if the mesh does not divide the vocabulary; given: True if model.vocab_size set it."""
        count = 1 if self.mesh is None else self.mesh.shape["tensor"]
        if size % count:
            rest = "" if given else f", such as {-(-size // count) * count}, which leaves some unused"
            whose = "" if given else " of data.tokenizer"
            raise ValueError(f"model.vocab_size: got {size}{whose}, expected a multiple of mesh.tensor = {count}{rest}")

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which models run over the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def sharding(self, *axes: str | None) -> jax.sharding.Sharding:
        """Return the sharding of an array whose axes have these names in `nn.sharding`."""
        if self.mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(self.mesh, spec(*axes))

    def of_state(self, state: PyTree) -> PyTree:
        """Return the shardings of a tree of arrays or shapes in which parameters and their moments have the same names.

        An array without such a name, or of another shape than its parameter, is replicated on every device.
        """
        shapes = {name: x.shape for name, x in state.params.items()}

        def one(path: tuple[Any, ...], x: Any) -> jax.sharding.Sharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in shapes]
            if self.mesh is None or not names or x.shape != shapes[names[-1]]:
                return self.sharding()
            return NamedSharding(self.mesh, parameter_spec(names[-1]))

        return jax.tree_util.tree_map_with_path(one, state)

    def batch(self, window: Window) -> Window:
        """Return the global batch over the mesh, given this process's `share` of its rows, [B / count, T]."""
        if self.mesh is None:
            return window
        index, count = self.share
        first, total = index * len(window["inputs"]), count * len(window["inputs"])

        def place(x: np.ndarray) -> jax.Array:
            def shard(at: Any) -> np.ndarray:
                start, stop, _ = at[0].indices(total)
                return x[(slice(start - first, stop - first), *at[1:])]

            return jax.make_array_from_callback((total, *x.shape[1:]), self.sharding("batch", "time"), shard)

        return cast(Window, jax.tree.map(place, window))


def _share(mesh: Mesh | None) -> tuple[int, int]:
    if mesh is None:
        return 0, 1
    blocks = mesh.shape["data"] * mesh.shape["fsdp"]
    shares: dict[int, set[int]] = {}
    places: dict[Any, Any] = dict(NamedSharding(mesh, P(AXIS_RULES["batch"])).devices_indices_map((blocks,)))
    for device, at in places.items():
        shares.setdefault(device.process_index, set()).update(range(*at[0].indices(blocks)))
    distinct = sorted({tuple(sorted(share)) for share in shares.values()})
    size = len(distinct[0])
    if [list(share) for share in distinct] != [list(range(i, i + size)) for i in range(0, blocks, size)]:
        raise ValueError(
            f"mesh: got {_product(mesh.shape)}, expected it to give every process an equal block of the rows"
        )
    return distinct.index(tuple(sorted(shares[jax.process_index()]))), len(distinct)


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{size} {axis}" for axis, size in sizes.items())
