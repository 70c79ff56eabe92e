"""Partition kernels in programs that `jax.jit` shards: every device runs them on its shard of batch and heads.

A kernel is opaque to XLA's partitioner, which would gather all arguments and run the whole kernel on every device.
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

# The axes of an array, one letter each: "b" batch, "k" key heads, "h" value heads, "." an axis that a kernel needs
# unsharded; A, B, ... are axes of vmap, innermost first.
Axes = str

_GROUP = "group"  # value heads of one key head
_MAPPED = string.ascii_uppercase


class Heads(NamedTuple):
    """Number of key heads and of value heads per key head."""

    keys: int
    group: int = 1

    def divisible(self, shards: int) -> bool:
        """Return True if every shard of the value heads has whole groups, or heads of one group only."""
        each, remainder = divmod(self.keys * self.group, shards)
        return remainder == 0 and (each % self.group == 0 or self.group % each == 0)


def per_shard(
    function: Callable[[Any, Any], Sequence[jax.Array]],
    arguments: Any,
    axes: Any,
    results: Sequence[Axes],
    options: Any,
    *,
    heads: Heads,
    interpret: bool,
) -> list[jax.Array]:
    """Return function(arguments, options); where jit shards batch or heads, each device runs it on its own shard.

    It is compiled once for all calls of the same shapes, even if the caller is not compiled. Inside `shard_map`, on one
    device and in the interpreter it adds nothing.

    Args:
        function: returns a list of arrays, for any batch and heads, without mixing them. Not a closure.
        arguments: a tree of arrays.
        axes: of every array, in the order of the tree.
        results: axes of every result.
        options: hashable.
        heads: of the unsharded arrays.
        interpret: True if the kernels are interpreted; the interpreter does not support several devices.

    Raises:
        NotImplementedError: inside a `shard_map` over some but not all axes of the mesh.
    """
    flat, tree = jax.tree.flatten(arguments)
    letters = tuple(jax.tree.leaves(axes))
    plain = interpret or _in_shard_map()
    return list(_entry(function, options, tree, letters, tuple(results), heads, plain)(*flat))


def _in_shard_map() -> bool:
    """Return True inside a shard_map over all mesh axes; raise NotImplementedError inside one over some of them."""
    mesh = jax.sharding.get_abstract_mesh()
    others = [name for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes]
    if mesh.manual_axes and others:
        inside = ", ".join(mesh.manual_axes)
        raise NotImplementedError(
            f"jax.shard_map: got one over {inside}, with {', '.join(others)} left to jit, the kernels need all or none"
        )
    return bool(mesh.manual_axes)


@functools.cache
def _entry(
    function: Callable[[Any, Any], Sequence[jax.Array]],
    options: Any,
    tree: Any,
    axes: tuple[Axes, ...],
    results: tuple[Axes, ...],
    heads: Heads,
    plain: bool,
) -> Callable[..., Sequence[jax.Array]]:
    def run(*flat: jax.Array) -> list[jax.Array]:
        return list(function(tree.unflatten(flat), options))

    return _partitioned(run, axes, results, heads, plain)


def _partitioned(
    run: Callable[..., list[jax.Array]], axes: Sequence[Axes], results: Sequence[Axes], heads: Heads, plain: bool
) -> Callable[..., Sequence[jax.Array]]:
    """Return run, partitioned unless plain, with a batching rule: a partitioned function has none."""
    sharded = run if plain else _with_rule(run, axes, results, heads)
    mappable = jax.custom_batching.custom_vmap(jax.jit(sharded))

    @mappable.def_vmap
    def _(_: int, mapped: Sequence[bool], *flat: jax.Array) -> tuple[Sequence[jax.Array], list[bool]]:
        letter = _MAPPED[sum(x in _MAPPED for x in results[0])]
        places = [0 if each else None for each in mapped]
        many = jax.vmap(run, in_axes=places)  # of any size: a device may have fewer
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
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):  # its arguments are already local
                return _with_local_keys(run, axes, split, heads, mesh, *flat)

        return mesh, by_device, shardings[len(axes) :], tuple(shardings[: len(axes)])

    sharded = custom_partitioning(run)
    left, right = (
        ", ".join(_factors(name, i, x, heads) for i, x in enumerate(arrays))
        for name, arrays in (("given", axes), ("made", results))
    )
    rule = f"{left} -> {right}"
    whole = tuple(word for word in rule.replace(",", " ").split() if word.startswith(("given", "made")))
    sizes = {_GROUP: heads.group} if "(" in rule else {}
    sharded.def_partition(partition, sharding_rule=rule, need_replication_factors=whole, **sizes)
    return sharded


def _factors(name: str, number: int, axes: Axes, heads: Heads) -> str:
    """Return the axes of an array in the notation of sharding rules."""
    values = "keys" if heads.group == 1 else _GROUP if heads.keys == 1 else f"(keys {_GROUP})"
    names = {"b": "batch", "k": "keys", "h": values} | {letter: f"mapped{letter}" for letter in _MAPPED}
    return " ".join(names.get(letter, f"{name}{number}_{i}") for i, letter in enumerate(axes))


def _agreed(axes: Sequence[Axes], arrays: Sequence[Any], heads: Heads) -> dict[str, tuple[str, ...]]:
    """Return the mesh axes to shard each letter over, in all arrays: the finest sharding that any of them has.

    Key heads are sharded like their value heads, as far as there are enough of them; axes that a kernel needs unsharded
    are not.
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
    used: set[str] = set()
    for letter, names in found.items():
        found[letter] = () if letter == "." or used & {*names} else names
        used |= {*found[letter]}
    while not heads.divisible(_product(found.get("h", ()), sizes)):
        found["h"] = found["h"][:-1]
    values = found.get("h", ())
    keys = values
    while heads.keys % _product(keys, sizes):
        keys = keys[:-1]
    return {**dict.fromkeys(f"b.{_MAPPED}", ()), **found, "h": values, "k": keys}


def _product(names: Sequence[str], sizes: Any) -> int:
    return math.prod(sizes[name] for name in names)


def _with_local_keys(
    run: Callable[..., list[jax.Array]],
    axes: Sequence[Axes],
    split: dict[str, tuple[str, ...]],
    heads: Heads,
    mesh: Any,
    *flat: jax.Array,
) -> list[jax.Array]:
    """Call run, with the key heads that this device's value heads need if there are more devices than key heads."""
    more = split["h"][len(split["k"]) :]
    if not more:
        return run(*flat)
    values = heads.keys * heads.group // _product(split["h"], mesh.shape)
    first = lax.div(lax.axis_index(more) * values, heads.group)
    count = max(1, values // heads.group)

    def local(x: jax.Array, letters: Axes) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, first, count, axis=letters.index("k")) if "k" in letters else x

    return run(*map(local, flat, axes))
