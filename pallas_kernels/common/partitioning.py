"""Kernels in a program that is sharded by `jax.jit`: every device runs those of its own batch and heads.

To XLA's partitioner a kernel is opaque: by itself it would gather all arguments and compute everything on every device.
"""

import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# What an axis of an array is, a letter each: "b" batch, "k" key heads, "h" value heads, "." an axis that a kernel needs
# whole; A, B, ... are axes of vmap, the innermost first.
Axes = str

_GROUP = "group"  # value heads of one key head
_MAPPED = string.ascii_uppercase


class Heads(NamedTuple):
    """Key heads, and how many value heads each of them has."""

    keys: int
    group: int = 1

    def split(self, parts: int) -> bool:
        """Whether each of as many parts of the value heads has whole groups, or all of them one key head."""
        each, rest = divmod(self.keys * self.group, parts)
        return rest == 0 and (each % self.group == 0 or self.group % each == 0)


def per_shard(
    function: Callable[[Any, Any], Sequence[jax.Array]],
    arguments: Any,
    axes: Any,
    results: Sequence[Axes],
    static: Any,
    *,
    heads: Heads,
    interpret: bool,
) -> list[jax.Array]:
    """function(arguments, static), by each device for its own part of the batch and heads where jit shards them.

    It is compiled once for all calls of the same shapes, also where the caller is not compiled. Inside of `shard_map`,
    on one device and in the interpreter it is what it would be without.

    Args:
        function: returns a list of arrays; of any batch and heads, without mixing them. Not a closure.
        arguments: a tree of arrays.
        axes: of every array, in the order of the tree.
        results: those of every result.
        static: hashable.
        heads: of the whole arrays.
        interpret: whether the kernels are interpreted, which knows nothing of several devices.

    Raises:
        NotImplementedError: inside of a `shard_map` over some axes of the mesh but not all.
    """
    flat, tree = jax.tree.flatten(arguments)
    letters = tuple(jax.tree.leaves(axes))
    plain = interpret or _in_shard_map()
    return list(_entry(function, static, tree, letters, tuple(results), heads, plain)(*flat))


def _in_shard_map() -> bool:
    """Whether each device is given its part. Raises NotImplementedError where it is, but along some mesh axes only."""
    mesh = jax.sharding.get_abstract_mesh()
    rest = [name for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes]
    if mesh.manual_axes and rest:
        inside = ", ".join(mesh.manual_axes)
        raise NotImplementedError(
            f"jax.shard_map: got one over {inside}, with {', '.join(rest)} left to jit, the kernels need all or none"
        )
    return bool(mesh.manual_axes)


@functools.cache
def _entry(
    function: Callable[[Any, Any], Sequence[jax.Array]],
    static: Any,
    tree: Any,
    axes: tuple[Axes, ...],
    results: tuple[Axes, ...],
    heads: Heads,
    plain: bool,
) -> Callable[..., Sequence[jax.Array]]:
    def run(*flat: jax.Array) -> list[jax.Array]:
        return list(function(tree.unflatten(flat), static))

    return _partitioned(run, axes, results, heads, plain)


def _partitioned(
    run: Callable[..., list[jax.Array]], axes: Sequence[Axes], results: Sequence[Axes], heads: Heads, plain: bool
) -> Callable[..., Sequence[jax.Array]]:
    """run, if not plain partitioned, with a rule for vmap: a partitioned function has none of its own."""
    sharded = run if plain else _with_rule(run, axes, results, heads)
    mappable = jax.custom_batching.custom_vmap(jax.jit(sharded))

    @mappable.def_vmap
    def _(_: int, mapped: Sequence[bool], *flat: jax.Array) -> tuple[Sequence[jax.Array], list[bool]]:
        letter = _MAPPED[sum(x in _MAPPED for x in results[0])]
        places = [0 if each else None for each in mapped]
        many = jax.vmap(run, in_axes=places)  # of no given size: a device may have fewer
        inner = [letter + x if each else x for x, each in zip(axes, mapped, strict=True)]
        out = _partitioned(many, inner, [letter + x for x in results], heads, plain)(*flat)
        return out, [True] * len(out)

    return mappable


def _with_rule(
    run: Callable[..., list[jax.Array]], axes: Sequence[Axes], results: Sequence[Axes], heads: Heads
) -> Callable[..., list[jax.Array]]:
    def partition(mesh: Any, given: Sequence[Any], made: Sequence[Any]) -> Any:
        letters = (*axes, *results)
        split = _agreed(letters, (*given, *made), heads)
        shardings = [NamedSharding(mesh, P(*(split[letter] for letter in x))) for x in letters]

        def by_device(*flat: jax.Array) -> list[jax.Array]:
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # what it is given is split no more
                return _with_own_keys(run, axes, split, heads, mesh, *flat)

        return mesh, by_device, shardings[len(axes) :], tuple(shardings[: len(axes)])

    sharded = custom_partitioning(run)
    left, right = (
        ", ".join(_factors(name, i, x, heads) for i, x in enumerate(part))
        for name, part in (("given", axes), ("made", results))
    )
    rule = f"{left} -> {right}"
    whole = tuple(word for word in rule.replace(",", " ").split() if word.startswith(("given", "made")))
    sizes = {_GROUP: heads.group} if "(" in rule else {}
    sharded.def_partition(partition, sharding_rule=rule, need_replication_factors=whole, **sizes)
    return sharded


def _factors(name: str, number: int, axes: Axes, heads: Heads) -> str:
    """The axes of an array in the notation of sharding rules."""
    values = "keys" if heads.group == 1 else _GROUP if heads.keys == 1 else f"(keys {_GROUP})"
    names = {"b": "batch", "k": "keys", "h": values} | {letter: f"mapped{letter}" for letter in _MAPPED}
    return " ".join(names.get(letter, f"{name}{number}_{i}") for i, letter in enumerate(axes))


def _agreed(axes: Sequence[Axes], arrays: Sequence[Any], heads: Heads) -> dict[str, tuple[str, ...]]:
    """For every letter the mesh axes to split it over, in all arrays: the finest split that any of them has now.

    Key heads are split with their value heads, as far as there are enough of them. What a kernel needs whole is not.
    """
    found: dict[str, tuple[str, ...]] = {}
    for letters, array in zip(axes, arrays, strict=True):
        if not isinstance(array.sharding, NamedSharding):
            raise NotImplementedError("kernels under jit: got a sharding without a mesh, expected NamedSharding")
        sizes = array.sharding.mesh.shape
        entries = (*array.sharding.spec, *[None] * len(letters))
        for letter, entry, size in zip(letters, entries, array.shape, strict=False):
            names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            letter = "h" if letter == "k" else letter
            if size % _product(names, sizes) == 0 and _product(names, sizes) > _product(found.get(letter, ()), sizes):
                found[letter] = names
    sizes = arrays[0].sharding.mesh.shape
    taken: set[str] = set()
    for letter, names in found.items():
        found[letter] = () if letter == "." or taken & {*names} else names
        taken |= {*found[letter]}
    while not heads.split(_product(found.get("h", ()), sizes)):
        found["h"] = found["h"][:-1]
    values = found.get("h", ())
    keys = values
    while heads.keys % _product(keys, sizes):
        keys = keys[:-1]
    return {**dict.fromkeys(f"b.{_MAPPED}", ()), **found, "h": values, "k": keys}


def _product(names: Sequence[str], sizes: Any) -> int:
    return math.prod(sizes[name] for name in names)


def _with_own_keys(
    run: Callable[..., list[jax.Array]],
    axes: Sequence[Axes],
    split: dict[str, tuple[str, ...]],
    heads: Heads,
    mesh: Any,
    *flat: jax.Array,
) -> list[jax.Array]:
    """run. Where there are more devices than key heads, it is given that of this device's value heads."""
    more = split["h"][len(split["k"]) :]
    if not more:
        return run(*flat)
    values = heads.keys * heads.group // _product(split["h"], mesh.shape)
    first = lax.div(lax.axis_index(more) * values, heads.group)
    count = max(1, values // heads.group)

    def own(x: jax.Array, letters: Axes) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, first, count, axis=letters.index("k")) if "k" in letters else x

    return run(*map(own, flat, axes))
