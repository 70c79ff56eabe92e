"""Layers over a mesh: every device has its rows, its tokens, and its heads or hidden units.

Parameters lie in parts on the devices of the axis fsdp and are brought together where they are used; their gradients
are summed and parted again. Each device of the axis tensor computes a part of every output, summed over them.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from osdn_jax.nn.chunked_loss import DEFAULT_CHUNKS, Chunks, cross_entropy
from osdn_jax.nn.sharding import parameter_axes, spec
from osdn_jax.ops import collectives


@runtime_checkable
class TensorParallel(Protocol):
    """A module that `over_mesh` can split over the mesh axis tensor."""

    @property
    def fused(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the projections fused along the last axis of a parameter, by the parameter's name."""

    def shard(self, count: int) -> nnx.GraphDef:
        """Return the graph of the module with 1/count of the heads or hidden units.

        The sum of the shards' outputs is the output of the whole module. Raises ValueError if count does not divide
        them.
        """


def over_mesh(
    module: TensorParallel,
    kind: str,
    call: Callable[[Any, jax.Array, jax.Array | None], jax.Array],
    mesh: jax.sharding.AbstractMesh,
    x: jax.Array,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """call(module, x [B, T, D], segment_ids [B, T]), which returns [B, T, D], over a mesh.

    Args:
        module: the module, whose output is a sum over its shards.
        kind: the module's name in `nn.sharding`: "mixer" or "mlp".
        call: runs a device's module on its part of x.
        mesh: that of `jax.set_mesh`.
        x: the residual stream.
        segment_ids: packed documents.
    """
    graph = module.shard(mesh.shape["tensor"])
    places, axes, parameters = {}, {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name = "/".join(map(str, path))
        places[name] = (path, variable.type)
        axes[name], value = parameter_axes(f"{kind}/{name}"), variable[...]
        if variable.type is nnx.Param and value.ndim == 2:
            value = value.astype(x.dtype)  # as the layer would, but before it travels
        parameters[name] = [value]
        if name in module.fused:
            sizes = module.fused[name]
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
            parameters[name] = jnp.split(value, ends, axis=-1)
            axes[name] = ("width" if axes[name][0] == "fused" else None, "heads")

    def body(parameters: dict[str, list[jax.Array]], x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        state = []
        for name, pieces in parameters.items():
            if "width" in axes[name]:
                at = axes[name].index("width")
                pieces = [lax.all_gather(piece, "fsdp", axis=at, tiled=True) for piece in pieces]
            path, variable = places[name]
            state.append((path, variable(jnp.concatenate(pieces, axis=-1))))
        return lax.psum(call(nnx.merge(graph, nnx.from_flat_state(state)), x, segment_ids), "tensor")

    stream, tokens = spec("batch", "time", None), spec("batch", "time")
    in_specs = ({name: [spec(*axes[name])] * len(pieces) for name, pieces in parameters.items()}, stream, tokens)
    return jax.shard_map(body, in_specs=in_specs, out_specs=stream)(parameters, x, segment_ids)


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of an embedding [Vocab, D] for tokens [B, T], over the mesh of `jax.set_mesh`: [B, T, D].

    A token outside the vocabulary has NaN, as in `layers.embed`.
    """

    def body(table: jax.Array, tokens: jax.Array) -> jax.Array:
        table = lax.all_gather(table, "fsdp", axis=1, tiled=True)
        row = tokens - table.shape[0] * lax.axis_index("tensor")
        here = (row >= 0) & (row < table.shape[0])
        rows = jnp.take(table, jnp.where(here, row, 0), axis=0)
        outside = (tokens < 0) | (tokens >= table.shape[0] * lax.axis_size("tensor"))
        others = jnp.where(outside, jnp.asarray(jnp.nan, rows.dtype), jnp.zeros((), rows.dtype))
        return lax.psum(jnp.where(here[..., None], rows, others[..., None]), "tensor")

    in_specs = (spec("vocabulary", "width"), spec("batch", "time"))
    return jax.shard_map(body, in_specs=in_specs, out_specs=spec("batch", "time", None))(table, tokens)


def cross_entropy_over_mesh(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunks: Chunks = DEFAULT_CHUNKS
) -> tuple[jax.Array, jax.Array]:
    """`cross_entropy` over the mesh of `jax.set_mesh`: every device has tokens of its own, and the whole matrix.

    The matrix's gradient is summed over the devices once, not in every chunk.
    """

    def body(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        unembedding = collectives.vary(unembedding, collectives.axes_of(hidden))
        return cross_entropy(hidden, unembedding, targets, chunks)

    tokens = spec("batch", "position")
    in_specs = (spec("batch", "position", None), spec(None, None), tokens)
    matrix = unembedding.astype(hidden.dtype)  # before it travels, as it is used
    return jax.shard_map(body, in_specs=in_specs, out_specs=(tokens, tokens))(hidden, matrix, targets)


def shard_size(name: str, size: int, count: int) -> int:
    """size / count. Raises ValueError, naming what is to be split, where count does not divide it."""
    if size % count:
        raise ValueError(f"{name}: got {size}, expected a multiple of the {count} devices of the mesh axis tensor")
    return size // count
