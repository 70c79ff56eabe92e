"""The state of a generation as one pytree, and what the programs do to the states of its blocks.

The states of blocks are those of `osdn_jax.nn`, of any kind of mixer. An attention cache is told by its fields
`position`, which all rows share, and `start`, the position of each row at which its text begins.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from osdn_jax.nn.cache import slot_positions
from osdn_jax.ops import State


class GenerationState(NamedTuple):
    """Everything that the continuation of B texts depends on; a pytree.

    Attributes:
        blocks: the states of the model's blocks, after all tokens of the texts but the last.
        token: [B], the last token of each text, which the model has not read yet.
        seen: [B, vocabulary], the tokens of each text, for the repetition penalty.
        length: [B], number of tokens of each text.
    """

    blocks: Any
    token: Int[Array, " B"]
    seen: Bool[Array, "B Vocab"]
    length: Int[Array, " B"]


def is_cache(node: Any) -> bool:
    """Return whether a node of the blocks' states is an attention cache."""
    return hasattr(node, "position") and hasattr(node, "start")


def map_caches(change: Callable[..., Any], blocks: Any, *more: Any) -> Any:
    """Replace every attention cache of the blocks' states by change(cache, ...) and keep the other arrays."""

    def at_node(node: Any, *others: Any) -> Any:
        return change(node, *others) if is_cache(node) else node

    return jax.tree.map(at_node, blocks, *more, is_leaf=is_cache)


def has_caches(blocks: Any) -> bool:
    """Return whether any block keeps an attention cache."""
    return any(is_cache(node) for node in jax.tree.leaves(blocks, is_leaf=is_cache))


def narrow(blocks: Any, dtype: Any) -> Any:
    """Return the blocks' states with recurrent states and attention caches in `dtype`; None changes nothing.

    Short convolutions' windows and preconditioners stay as they are: they are small, and steps of a preconditioner can
    be smaller than the spacing of bfloat16 numbers.
    """
    if dtype is None:
        return blocks

    def cast(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def at_node(node: Any) -> Any:
        if is_cache(node):
            return jax.tree.map(cast, node)
        return node._replace(recurrent=cast(node.recurrent)) if isinstance(node, State) else node

    return jax.tree.map(at_node, blocks, is_leaf=_is_narrowed)


def widen(blocks: Any, dtype: Any) -> Any:
    """Return the blocks' states with recurrent states in float32, as rules compute them; None changes nothing."""
    if dtype is None:
        return blocks

    def at_node(node: Any) -> Any:
        return node._replace(recurrent=node.recurrent.astype(jnp.float32)) if isinstance(node, State) else node

    return jax.tree.map(at_node, blocks, is_leaf=_is_narrowed)


def _is_narrowed(node: Any) -> bool:
    return is_cache(node) or isinstance(node, State)


def number_of_bytes(tree: Any) -> int:
    """Return the memory of a pytree of arrays, in bytes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def take_rows(blocks: Any, rows: Int[Array, " R"]) -> Any:
    """Return the blocks' states of some rows."""

    def take(x: Any) -> Any:
        return jnp.take(x, rows, axis=0)

    def at_node(node: Any) -> Any:
        if is_cache(node):
            return jax.tree.map(take, node._replace(position=None))._replace(position=node.position)
        return take(node)

    return jax.tree.map(at_node, blocks, is_leaf=is_cache)


def fit_caches(blocks: Any, shapes: Any) -> Any:
    """Return the blocks' states with attention caches of other sizes, which keep as many of the last tokens as fit.

    Args:
        blocks: the states.
        shapes: states of the wanted shapes, or their shapes.
    """

    def fit(cache: Any, wanted: Any) -> Any:
        arrays = {name: x for name, x in cache._asdict().items() if name not in ("position", "start")}
        return cache._replace(
            **{name: _in_slots(x, cache.position, getattr(wanted, name).shape[-2]) for name, x in arrays.items()}
        )

    return map_caches(fit, blocks, shapes)


def _in_slots(x: Array, position: Int[Array, ""], size: int) -> Array:
    """Return a cache [..., S, C] in which position p is in slot p modulo S, in `size` slots."""
    before = x.shape[-2]
    if size == before:
        return x
    held = slot_positions(size, position)
    known = (held >= 0) & (held >= position - before)
    rows = jnp.take(x, jnp.where(known, held % before, 0), axis=-2)
    return jnp.where(known.reshape(*[1] * (x.ndim - 2), -1, 1), rows, jnp.zeros_like(rows))


def without_caches(blocks: Any, tokens: int) -> Any:
    """Return the blocks' states with None in place of each attention cache that holds this number of tokens."""

    def held(cache: Any) -> Any:
        slots = {x.shape[-2] for name, x in cache._asdict().items() if name not in ("position", "start")}
        return None if min(slots) >= tokens else cache

    return map_caches(held, blocks)


def rewound(blocks: Any, caches: Any, position: int) -> Any:
    """Return the blocks' states at an earlier position, with the caches that `without_caches` has left out.

    Args:
        blocks: the states at that position, from `without_caches`.
        caches: states at a later position, whose caches still hold every token.
        position: number of tokens that had been read.
    """

    def at_node(later: Any, earlier: Any) -> Any:
        return later._replace(position=np.int32(position)) if earlier is None else earlier

    return jax.tree.map(at_node, caches, blocks, is_leaf=is_cache)
