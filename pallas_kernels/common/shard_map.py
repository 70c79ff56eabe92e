"""Mesh axes that arrays vary over inside a `jax.shard_map`."""

from typing import Any

import jax
from jax import lax


def axes_of(tree: Any) -> frozenset[str]:
    """Return the mesh axes that any array of the tree varies over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Return the arrays marked as varying over these mesh axes too."""

    def one(x: jax.Array) -> jax.Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(one, tree)


def match_varying_axes(tree: Any) -> Any:
    """Return the arrays, inside shard_map marked as varying over every mesh axis that any of them varies over.

    A custom gradient needs this of its arguments: each cotangent must vary over the same axes as its argument.
    """
    return vary(tree, axes_of(tree))
