"""Layers over a mesh: each device computes some of the rows, of the tokens, and of the heads or hidden units.

Parameters are sharded over the mesh axis fsdp: all-gathered on use, and their gradients reduce-scattered. The outputs
of the shards over the axis tensor are partial sums, reduced over that axis.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from osdn_jax.nn.chunked_loss import DEFAULT_CHUNKS, Chunks, cross_entropy
from osdn_jax.nn.sharding import parameter_axes, spec
from osdn_jax.ops import sequence_parallel


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
    prefix: str,
    call: Callable[..., jax.Array],
    mesh: jax.sharding.AbstractMesh,
    x: jax.Array,
    *rows: jax.Array | None,
) -> jax.Array:
    """Return call(module, x, *rows), [B, T, D], computed over a mesh.

    Args:
        module: the module; its output is the sum of its shards' outputs.
        prefix: the module's name in the parameter table of `nn.sharding`, "mixer" or "mlp".
        call: (shard of the module, x, *rows) -> output, on each device's shards of the arrays.
        mesh: the mesh of `jax.set_mesh`.
        x: the residual stream, [B, T, D].
        *rows: further arrays [B, T, ...], such as segment_ids, or None.

    Raises:
        ValueError: the axis tensor has a size that does not divide the heads, hidden units or experts.
    """
    graph = module.shard(mesh.shape["tensor"])
    variables, axes, parameters = {}, {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name = "/".join(map(str, path))
        variables[name] = (path, variable.type)
        axes[name], value = parameter_axes(f"{prefix}/{name}"), variable[...]
        if variable.type is nnx.Param and value.ndim >= 2:
            value = value.astype(x.dtype)  # as the layer does, but before the all-gather
        parameters[name] = [value]  # one array per fused projection
        if name in module.fused:
            sizes = module.fused[name]
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
            parameters[name] = jnp.split(value, ends, axis=-1)  # so that each is sharded by its own heads
            whole = ("width" if axes[name][0] == "fused" else None,) if value.ndim == 2 else ()
            axes[name] = (*whole, "heads")

    def body(parameters: dict[str, list[jax.Array]], x: jax.Array, *rows: jax.Array | None) -> jax.Array:
        state = []
        for name, projections in parameters.items():
            if "width" in axes[name]:
                axis = axes[name].index("width")
                projections = [lax.all_gather(y, "fsdp", axis=axis, tiled=True) for y in projections]
            path, variable = variables[name]
            state.append((path, variable(jnp.concatenate(projections, axis=-1))))
        return lax.psum(call(nnx.merge(graph, nnx.from_flat_state(state)), x, *rows), "tensor")

    stream, tokens = spec("batch", "time", None), [spec("batch", "time")] * len(rows)
    of_parameters = {name: [spec(*axes[name])] * len(projections) for name, projections in parameters.items()}
    in_specs = (of_parameters, stream, *tokens)
    return jax.shard_map(body, in_specs=in_specs, out_specs=stream)(parameters, x, *rows)


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the tokens' rows of an embedding, over the mesh of `jax.set_mesh`; NaN as in `layers.embed`.

    Args:
        table: [vocabulary, D].
        tokens: [B, T] integers.

    Returns:
        [B, T, D].
    """

    def body(table: jax.Array, tokens: jax.Array) -> jax.Array:
        table = lax.all_gather(table, "fsdp", axis=1, tiled=True)
        row = tokens - table.shape[0] * lax.axis_index("tensor")
        is_local = (row >= 0) & (row < table.shape[0])
        rows = jnp.take(table, jnp.where(is_local, row, 0), axis=0)
        outside = (tokens < 0) | (tokens >= table.shape[0] * lax.axis_size("tensor"))
        others = jnp.where(outside, jnp.asarray(jnp.nan, rows.dtype), jnp.zeros((), rows.dtype))
        return lax.psum(jnp.where(is_local[..., None], rows, others[..., None]), "tensor")

    in_specs = (spec("vocabulary", "width"), spec("batch", "time"))
    return jax.shard_map(body, in_specs=in_specs, out_specs=spec("batch", "time", None))(table, tokens)


def cross_entropy_over_mesh(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, chunks: Chunks = DEFAULT_CHUNKS
) -> tuple[jax.Array, jax.Array]:
    """Compute `cross_entropy` over the mesh of `jax.set_mesh`: each device has some tokens and the whole matrix.

    The gradient of the matrix is summed over the devices once, not in every chunk.
    """

    def body(hidden: jax.Array, unembedding: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        unembedding = sequence_parallel.vary(unembedding, sequence_parallel.axes_of(hidden))
        return cross_entropy(hidden, unembedding, targets, chunks)

    tokens = spec("batch", "position")
    in_specs = (spec("batch", "position", None), spec(None, None), tokens)
    matrix = unembedding.astype(hidden.dtype)  # cast before the all-gather
    return jax.shard_map(body, in_specs=in_specs, out_specs=(tokens, tokens))(hidden, matrix, targets)


def shard_size(name: str, size: int, count: int) -> int:
    """Return size / count. Raises a ValueError that names what is split if count does not divide it."""
    if size % count:
        raise ValueError(f"{name}: got {size}, expected a multiple of the {count} devices of the mesh axis tensor")
    return size // count
