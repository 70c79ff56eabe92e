"""Sharding of parameters and activations: each array axis has a logical name, and `AXIS_RULES` maps it to mesh axes.

A model runs on several devices if it is called under `jax.set_mesh` of a mesh with the axes `MESH_AXES`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor", "context")
"""Axes of a mesh that a model runs on: copies, sharded parameters, heads and hidden units, tokens of a sequence."""

AXIS_RULES: dict[str | None, Any] = {
    "batch": ("data", "fsdp"),  # rows: over copies of the model, and over the devices that share one copy's parameters
    "time": "context",  # tokens of a sequence
    "position": ("context", "tensor"),  # tokens of a sequence in the loss, where each token is independent
    "width": "fsdp",  # the residual stream, in parameters
    "fused": ("fsdp", "tensor"),  # the residual stream, in matrices that fuse several projections
    "heads": "tensor",  # heads, and everything that belongs to one head
    "hidden": "tensor",  # units of the MLP
    "experts": "tensor",  # of a mixture
    "vocabulary": "tensor",
    None: None,
}

# (end of a parameter's path, names of its axes); the first match counts.
_PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding/embedding", ("vocabulary", "width")),
    (r"head/kernel", ("width", "vocabulary")),
    (r"mlp/(shared/)?gate_and_up/kernel", ("fused", None)),
    (r"mlp/(shared/)?down/kernel", ("hidden", "width")),
    (r"mlp/(router|shared_gate)/kernel", ("width", None)),
    (r"mlp/router_bias", (None,)),
    (r"mlp/experts_gate_and_up", ("experts", "width", None)),
    (r"mlp/experts_down", ("experts", None, "width")),
    (r"mixer/project/kernel", ("fused", None)),
    (r"mixer/project/bias", ("heads",)),
    (r"mixer/convolution/kernel", (None, None)),
    (r"mixer/output/kernel", ("heads", "width")),
    (r"mixer/(decay/down|gate/down|query_down|down)/kernel", ("width", None)),
    (r"mixer/(decay/project|gate/project|up)/kernel", (None, "heads")),
    (r"mixer/gate/project/bias", ("heads",)),
    (r"mixer/(gram_)?decay/(log_rate|bias|scale)", ("heads",)),
    (r"mixer/(beta|gate|query|gram_gain|(erase_gate|write_gate|gram_decay)/project|forget)/kernel", ("width", "heads")),
    (r"mixer/(forget/bias|gram_center|gram_log_squash|eta)", ("heads",)),
    (r"mixer/initial", ("heads", None)),
    (r"(\w+_)?norm/scale", (None,)),
)


def parameter_axes(name: str) -> tuple[str | None, ...]:
    """Return the logical names of a parameter's axes, by its path in the model.

    Raises:
        ValueError: the table in this module has no entry for the parameter.
    """
    for pattern, axes in _PARAMETERS:
        if re.search(rf"(^|/){pattern}$", name):
            return axes
    raise ValueError(f"parameter {name!r} has no axes in osdn_jax.nn.sharding")


def parameter_spec(name: str) -> P:
    """Return the partition of a parameter, by its path such as "blocks/0/mixer/project/kernel"."""
    return spec(*parameter_axes(name))


def spec(*axes: str | None) -> P:
    """Return the partition of an array with these logical axes."""
    return P(*(AXIS_RULES[axis] for axis in axes))


def with_auto_axes(call: Callable[..., Any], x: jax.Array, *arrays: Any) -> Any:
    """Return call(x, *arrays), computed with Auto axes if the mesh has Explicit ones: the compiler partitions it.

    The mesh is that of `jax.set_mesh`, or that of x. Results [B, T, ...] and [B, ...] are sharded by rows as x is (over
    a mesh with the axes `MESH_AXES`, as those say); other results are replicated. Without Explicit axes this is the
    plain call.

    Args:
        call: a function of arrays.
        x: [B, T, ...].
        arrays: further arguments of `call`, trees of arrays.
    """
    mesh = _explicit_mesh(x)
    if mesh is None:
        return call(x, *arrays)
    if set(MESH_AXES) <= set(mesh.axis_names):
        rows, time = AXIS_RULES["batch"], AXIS_RULES["time"]
    else:
        rows, time = jax.typeof(x).sharding.spec[0], None
    auto = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, (AxisType.Auto,) * len(mesh.axis_names))
    with jax.sharding.use_abstract_mesh(auto):
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (x, *arrays))
        shapes = jax.eval_shape(call, *plain)
    batch, length = x.shape[:2]

    def place(y: Any) -> P:
        if y.ndim < 2 or y.shape[0] != batch:
            return P()
        return P(rows, time) if y.shape[1] == length else P(rows)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(call, out_sharding=jax.tree.map(place, shapes))(x, *arrays)


def _explicit_mesh(x: jax.Array) -> jax.sharding.AbstractMesh | None:
    for mesh in (jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh):
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def module_with_auto_axes(method: Callable[..., Any], module: nnx.Module, x: jax.Array, *more: Any) -> Any:
    """Return method(module, x, *more) as `with_auto_axes` does; the module's parameters may be sharded too."""
    if _explicit_mesh(x) is None:
        return method(module, x, *more)
    graph, parameters = nnx.split(module)

    def call(x: jax.Array, parameters: Any, *more: Any) -> Any:
        return method(nnx.merge(graph, parameters), x, *more)

    return with_auto_axes(call, x, parameters, *more)


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """Return the mesh of `jax.set_mesh` if it has the axes `MESH_AXES`; None without, and inside a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    return None if AxisType.Manual in mesh.axis_types else mesh


def refuse_mesh(name: str = "generation") -> None:
    """Raise ValueError under `jax.set_mesh` of a mesh that models run on: over it they keep no states.

    Args:
        name: what is called, for the error message.
    """
    if (mesh := ambient_mesh()) is not None:
        axes = ", ".join(str(axis) for axis in mesh.axis_names)
        raise ValueError(
            f"{name}: got a call under jax.set_mesh of a mesh ({axes}), over which models keep no states; expected a "
            "call without jax.set_mesh"
        )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Return x with the sharding of these logical axes; x itself without a mesh."""
    return x if ambient_mesh() is None else jax.lax.with_sharding_constraint(x, spec(*axes))
