"""Which mesh axes arrays vary over inside a `jax.shard_map`."""

from typing import Any

import jax
from jax import lax


def axes_of(tree: Any) -> frozenset[str]:
    """The mesh axes that any of the arrays varies over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The arrays as ones that vary over mesh axes, whatever they varied over before."""

    def one(x: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(one, tree)


def match_varying_axes(tree: Any) -> Any:
    """The arrays, under shard_map as ones that vary over every mesh axis that any of them varies over.

    A custom gradient needs it of its arguments: each cotangent must vary over the axes that its argument does.
    """
    return vary(tree, axes_of(tree))
