"""Run operators on arrays whose types carry a sharding (meshes with Explicit axes).

Batch rows and heads are independent, so every device computes its own under `jax.shard_map` without communication. With
Auto axes the types carry no sharding, and the compiler finds the same partition.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from osdn_jax.ops import sequence_parallel
from osdn_jax.ops.arguments import per_value_head

PyTree = Any
MeshAxes = tuple[str, ...]

# Letters for the axes of an array: b batch, h value heads, g key heads (h / g value heads each); other letters are axes
# that must not be sharded.
_NAMES = {"b": "batch", "h": "heads", "g": "heads"}


def over_shards(
    run: Callable[..., PyTree],
    static: tuple[Any, ...],
    arrays: PyTree,
    axes: PyTree,
    results: PyTree,
    names: Sequence[str],
) -> PyTree:
    """Return run(*static, arrays), each device computing its rows and heads if the arrays' types are sharded.

    JAX refuses `jax.vmap` over an axis that is sharded over an Explicit mesh axis: shard rows or heads instead.

    Args:
        run: a pure function of the arrays in which rows and heads are independent.
        static: hashable arguments of run.
        arrays: a NamedTuple or another pytree; fields may be None.
        axes: the same structure with a letter for each axis of each array, such as "bthv".
        results: the same for the results of run.
        names: argument names of the arrays' leaves, for error messages.

    Raises:
        ValueError: an axis other than batch or heads is sharded, or two arrays are sharded in different ways.
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
        # Fewer key heads than devices: repeat them, one per value head.
        leaves = [
            per_value_head(x, sizes["h"], axes.index("g")) if "g" in axes else x
            for x, axes in zip(leaves, letters, strict=True)
        ]

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
    """Return the jitted function of the arrays' leaves, cached so that equal calls compile once."""
    used = {axis for spec in in_specs for entry in spec for axis in _axes_of(entry)}
    manual = {name for name, type_ in zip(mesh.axis_names, mesh.axis_types, strict=True) if type_ == AxisType.Explicit}

    def body(*leaves: jax.Array) -> PyTree:
        return run(*static, treedef.unflatten(sequence_parallel.vary(list(leaves), frozenset(used))))

    sharded = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual)

    @jax.jit
    def program(*leaves: jax.Array) -> PyTree:
        placed = (jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(leaves, in_specs, strict=True))
        return sharded(*placed)

    return program


def _explicit_mesh(leaves: list[jax.Array]) -> jax.sharding.AbstractMesh | None:
    """Return the mesh of the first array that is sharded over Explicit axes; None if there is none."""
    for x in leaves:
        sharding = jax.typeof(x).sharding
        if any(entry is not None for entry in sharding.spec):
            return sharding.mesh.abstract_mesh if isinstance(sharding.mesh, jax.sharding.Mesh) else sharding.mesh
    return None


def _split(leaves: list[jax.Array], letters: list[str], names: Sequence[str]) -> dict[str, MeshAxes]:
    """Return the mesh axes that the arrays are sharded over, {"batch": ..., "heads": ...}."""
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
    split = {name: found[name][1] if name in found else () for name in ("batch", "heads")}
    both = set(split["batch"]) & set(split["heads"])
    if both:
        raise ValueError(
            f"{found['heads'][0]}: got heads split over the mesh axes {tuple(sorted(both))}, which split the batch of "
            f"{found['batch'][0]}; expected other ones"
        )
    return split


def _axes_of(entry: Any) -> MeshAxes:
    """Return the mesh axes of an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _size(mesh: jax.sharding.AbstractMesh, axes: MeshAxes) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size
