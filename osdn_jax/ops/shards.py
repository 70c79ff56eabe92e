"""Operators on arrays whose types say how they are split over devices (meshes with Explicit axes).

Rows of a batch and heads do not depend on each other, so every device runs its own under `jax.shard_map` and nothing
travels. With Auto axes the types say nothing, and the compiler finds the same split.
"""

import functools
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
    run: Callable[..., PyTree],
    static: tuple[Any, ...],
    arrays: PyTree,
    axes: PyTree,
    results: PyTree,
    names: Sequence[str],
) -> PyTree:
    """run(*static, arrays), on each device for its rows and heads where the arrays' types are split over a mesh.

    Args:
        run: a pure function of the arrays that treats every row and head for itself.
        static: hashable arguments of run.
        arrays: a NamedTuple or another pytree; parts may be None.
        axes: the same with a letter for each axis of each array, such as "bthv".
        results: likewise for what run returns.
        names: of the arrays' leaves, for messages.

    Under `jax.vmap` over an axis that an Explicit mesh axis splits, JAX refuses it: split rows or heads instead.

    Raises:
        ValueError: an axis other than batch or heads is split, or two arrays are split in different ways.
    """
    treedef: Any = jax.tree.structure(arrays)
    leaves = jax.tree.leaves(arrays)
    letters = treedef.flatten_up_to(axes)
    mesh = _explicit_mesh(leaves)
    if mesh is None:
        return run(*static, arrays)
    split = _split(leaves, letters, names)
    sizes = {letter: x.shape[i] for x, axes in zip(leaves, letters, strict=True) for i, letter in enumerate(axes)}
    if sizes.get("g", 0) % _size(mesh, split["heads"]):
        # Fewer key heads than devices: every value head gets a copy of its own.
        leaves = [_per_value_head(x, axes, sizes["h"]) for x, axes in zip(leaves, letters, strict=True)]

    def spec(axes: str) -> P:
        return P(*(split[_NAMES[letter]] or None if letter in _NAMES else None for letter in axes))

    in_specs, out_specs = tuple(spec(axes) for axes in letters), tuple(spec(axes) for axes in results)
    return _program(run, static, treedef, mesh, in_specs, out_specs)(*leaves)


@functools.lru_cache(maxsize=256)
def _program(
    run: Callable[..., PyTree],
    static: tuple[Any, ...],
    treedef: Any,
    mesh: jax.sharding.AbstractMesh,
    in_specs: tuple[P, ...],
    out_specs: tuple[P, ...],
) -> Callable[..., PyTree]:
    """The jitted function of the arrays' leaves; the same for equal calls, so that they compile once."""
    used = {axis for spec in in_specs for entry in spec for axis in _axes_of(entry)}
    manual = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}

    def body(*leaves: jax.Array) -> PyTree:
        return run(*static, treedef.unflatten(collectives.vary(list(leaves), frozenset(used))))

    sharded = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual)

    @jax.jit
    def program(*leaves: jax.Array) -> PyTree:
        placed = (jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(leaves, in_specs, strict=True))
        return sharded(*placed)

    return program


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
            mesh_axes = _axes_of(entry)
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


def _axes_of(entry: Any) -> MeshAxes:
    """The mesh axes of an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


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
