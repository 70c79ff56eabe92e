"""Operators on arrays whose types say how they are split over devices (meshes with Explicit axes).

Rows of a batch and heads do not depend on each other, so every device runs its own under `jax.shard_map` and nothing
travels. With Auto axes the types say nothing, and the compiler finds the same split.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from osdn_jax.ops import collectives

PyTree = Any
MeshAxes = tuple[str, ...]

# One letter for each axis of an array: b batch, h value heads, g key heads, which serve h / g value heads each; any
# other letter is an axis that is not split.
_NAMES = {"b": "batch", "h": "heads", "g": "heads"}


def over_shards(
    run: Callable[[PyTree], PyTree], arrays: PyTree, axes: PyTree, results: PyTree, names: Sequence[str] | None = None
) -> PyTree:
    """run(arrays), on each device for its rows and heads where the arrays' types are split over an Explicit mesh.

    Args:
        run: a pure function of the arrays that treats every row and head for itself.
        arrays: a NamedTuple or another pytree; parts may be None.
        axes: the same with a letter for each axis of each array, such as "bthv".
        results: likewise for what run returns.
        names: of the arrays' leaves, for messages; default: their places in the tree.

    Raises:
        ValueError: an axis other than batch or heads is split, or two arrays are split in different ways.
    """
    treedef: Any = jax.tree.structure(arrays)
    leaves = jax.tree.leaves(arrays)
    letters = treedef.flatten_up_to(axes)
    names = names or [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree.leaves_with_path(arrays)]
    mesh = _explicit_mesh(leaves)
    if mesh is None:
        return run(arrays)
    split = _split(leaves, letters, names)
    heads = {
        letter: [x.shape[axes.index(letter)] for x, axes in zip(leaves, letters, strict=True) if letter in axes]
        for letter in "gh"
    }
    parts = _size(mesh, split["heads"])
    if heads["g"] and heads["g"][0] % parts:
        # Fewer key heads than devices: every value head gets a copy of its own.
        leaves = [_per_value_head(x, axes, heads["h"][0]) for x, axes in zip(leaves, letters, strict=True)]

    def spec(axes: str) -> P:
        return P(*(split[_NAMES[letter]] or None if letter in _NAMES else None for letter in axes))

    def body(*leaves: jax.Array) -> PyTree:
        everywhere = frozenset(split["batch"] + split["heads"])
        return run(treedef.unflatten(collectives.vary(list(leaves), everywhere)))

    in_specs = tuple(spec(axes) for axes in letters)
    leaves = [jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(leaves, in_specs, strict=True)]
    manual = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    out_specs = jax.tree.map(spec, results)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual)(*leaves)


def _explicit_mesh(leaves: list[jax.Array]) -> jax.sharding.AbstractMesh | None:
    """The mesh of the first array that is split over Explicit axes; None where none is."""
    for x in leaves:
        sharding = jax.typeof(x).sharding
        if any(entry is not None for entry in sharding.spec):
            return sharding.mesh.abstract_mesh if isinstance(sharding.mesh, jax.sharding.Mesh) else sharding.mesh
    return None


def _split(leaves: list[jax.Array], letters: list[str], names: Sequence[str]) -> dict[str, MeshAxes]:
    """{"batch": mesh axes, "heads": mesh axes} that the arrays are split over."""
    found: dict[str, tuple[str, MeshAxes]] = {}
    for x, axes, name in zip(leaves, letters, names, strict=True):
        for letter, entry in zip(axes, jax.typeof(x).sharding.spec, strict=True):
            mesh_axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
            if not mesh_axes:
                continue
            if letter not in _NAMES:
                raise ValueError(
                    f"{name}: got its axis {axes.index(letter)} split over the mesh axes {mesh_axes}, expected batch "
                    "and heads alone to be split; a sequence is split by context_axis, inside jax.shard_map"
                )
            before, others = found.setdefault(_NAMES[letter], (name, mesh_axes))
            if others != mesh_axes:
                raise ValueError(
                    f"{name}: got {_NAMES[letter]} split over the mesh axes {mesh_axes}, expected {others} as for "
                    f"{before}"
                )
    split = {kind: found[kind][1] if kind in found else () for kind in ("batch", "heads")}
    both = set(split["batch"]) & set(split["heads"])
    if both:
        raise ValueError(
            f"{found['heads'][0]}: got heads split over the mesh axes {tuple(sorted(both))}, which split the batch of "
            f"{found['batch'][0]}; expected other ones"
        )
    return split


def _size(mesh: jax.sharding.AbstractMesh, axes: MeshAxes) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def _per_value_head(x: jax.Array, axes: str, heads: int) -> jax.Array:
    if "g" not in axes:
        return x
    axis = axes.index("g")
    return jnp.repeat(x, heads // x.shape[axis], axis=axis)
