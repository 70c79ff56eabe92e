"""How parameters and activations lie on a mesh: each axis of an array has a name, and each name its mesh axes.

A model runs over several devices where its call is traced under `jax.set_mesh` of a mesh with the axes `MESH_AXES`.
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

AXIS_RULES: dict[str | None, Any] = {
    "batch": ("data", "fsdp"),  # rows: copies of the model, and devices that share one copy's parameters
    "time": "context",  # tokens of a sequence
    "position": ("context", "tensor"),  # likewise, where every token is for itself: the loss
    "width": "fsdp",  # of the residual stream, in parameters
    "fused": ("fsdp", "tensor"),  # likewise, of matrices that make several kinds of heads or units at once
    "heads": "tensor",  # heads, and all that belongs to one head
    "hidden": "tensor",  # units of the MLP
    "vocabulary": "tensor",
    None: None,
}

# By the end of a parameter's path, the first that fits.
_PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embedding/embedding", ("vocabulary", "width")),
    (r"head/kernel", ("width", "vocabulary")),
    (r"mlp/gate_and_up/kernel", ("fused", None)),
    (r"mlp/down/kernel", ("hidden", "width")),
    (r"mixer/project/kernel", ("fused", None)),
    (r"mixer/convolution/kernel", (None, None)),
    (r"mixer/output/kernel", ("heads", "width")),
    (r"mixer/decay/down/kernel", ("width", None)),
    (r"mixer/decay/project/kernel", (None, "heads")),
    (r"mixer/(gram_)?decay/(log_rate|bias)", ("heads",)),
    (r"mixer/(beta|gate|gram_gain|(erase_gate|write_gate|gram_decay)/project|forget)/kernel", ("width", "heads")),
    (r"mixer/(forget/bias|gram_center)", ("heads",)),
    (r"mixer/initial", ("heads", None)),
    (r"(\w+_)?norm/scale", (None,)),
)


def parameter_axes(name: str) -> tuple[str | None, ...]:
    """The names of a parameter's axes, by its path in the model. Raises ValueError for one that has none."""
    for pattern, axes in _PARAMETERS:
        if re.search(rf"(^|/){pattern}$", name):
            return axes
    raise ValueError(f"parameter {name!r} has no axes in osdn_jax.nn.sharding")


def parameter_spec(name: str) -> P:
    """Where a parameter lies."""
    return spec(*parameter_axes(name))


def spec(*axes: str | None) -> P:
    """Where an array with axes of these names lies."""
    return P(*(AXIS_RULES[axis] for axis in axes))


def with_auto_axes(call: Callable[..., Any], x: jax.Array, *arrays: Any) -> Any:
    """call(x, *arrays), with Auto axes in place of a mesh's Explicit ones: the compiler finds how arrays lie.

    On a mesh with Explicit axes, that of `jax.set_mesh` or of x [B, T, ...], results of two axes and more lead with the
    rows of x and are split by them as x is; in a mesh with the axes `MESH_AXES` as those say. Other results are whole
    on every device. Without such a mesh it is the plain call.
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
    """method(module, x, *more) likewise, where the module's parameters may be split over the mesh, too."""
    if _explicit_mesh(x) is None:
        return method(module, x, *more)
    graph, parameters = nnx.split(module)

    def call(x: jax.Array, parameters: Any, *more: Any) -> Any:
        return method(nnx.merge(graph, parameters), x, *more)

    return with_auto_axes(call, x, parameters, *more)


def ambient_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh of `jax.set_mesh` if a model is to run over it; None outside of one, and inside a `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(MESH_AXES) <= set(mesh.axis_names):
        return None
    return None if AxisType.Manual in mesh.axis_types else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, laid out over the mesh by the names of its axes; as it is without a mesh."""
    return x if ambient_mesh() is None else jax.lax.with_sharding_constraint(x, spec(*axes))
