"""The training step of a configuration as shapes on a mesh; nothing is allocated."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from osdn_jax.nn import ModelConfig
from osdn_jax.nn.likelihood import likelihood_sums
from osdn_jax.nn.sharding import MESH_AXES
from osdn_jax.nn.split import Parameters, split_model
from osdn_jax.training.build import build_model_config, build_step_config
from osdn_jax.training.initial_state import shapes_at_start
from osdn_jax.training.mesh import Layout, build_mesh, mesh_sizes
from osdn_jax.training.starting_point import with_init
from osdn_jax.training.step import StepConfig, TrainState, make_train_step

_BATCH = {"inputs": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
_MAX_TOKENS = 2**31  # the compiler counts them in 32 bits and aborts the process on overflow


class Program(NamedTuple):
    """A training step and the shapes of its arguments."""

    model: ModelConfig
    step_config: StepConfig
    mesh: Mesh
    apply: Callable[..., Any]
    step: Any  # jitted
    state: TrainState  # shapes with shardings, like the batch
    batch: dict[str, jax.ShapeDtypeStruct]  # [B, T] each

    def lower(self) -> jax.stages.Lowered:
        """Lower the step for the devices of the mesh."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.batch)


def build_program(config: ConfigDict, devices: list[jax.Device]) -> Program:
    """Return the training step of a run on these devices.

    Args:
        config: the configuration of the run.
        devices: all devices of the run.

    Raises:
        ValueError: the configuration is not valid for these devices, or does not use all of them.
    """
    for name in ("batch_size", "sequence_length", "accumulate"):
        if config[name] < 1:
            raise ValueError(f"{name}: got {config[name]}, expected at least 1")
    tokens = config.batch_size * config.sequence_length
    if tokens >= _MAX_TOKENS:
        raise ValueError(
            f"batch_size, sequence_length: got {config.batch_size} x {config.sequence_length} tokens a step, expected "
            f"fewer than {_MAX_TOKENS:,}"
        )
    config = with_init(config)
    sizes = mesh_sizes(config, len(devices))
    used = math.prod(sizes.values())
    if used != len(devices):
        raise ValueError(
            f"mesh: got {' x '.join(f'{size} {axis}' for axis, size in sizes.items())}, {used} in all, expected the "
            f"{len(devices)} devices of the plan; --config.mesh.fsdp=-1 takes all that are left"
        )
    # One device needs a mesh too: it tells the compiler what to compile for.
    mesh = build_mesh(config, devices) or jax.make_mesh((1,) * 4, MESH_AXES, (AxisType.Auto,) * 4, devices=devices)
    layout = Layout(mesh)
    step_config = build_step_config(config)
    model, optimizer, state = shapes_at_start(config, layout)
    apply, _ = split_model(model)
    rows = layout.sharding("batch", "time")
    shape = (config.batch_size, config.sequence_length)
    return Program(
        model=build_model_config(config),
        step_config=step_config,
        mesh=mesh,
        apply=apply,
        step=make_train_step(apply, optimizer, step_config, shardings=jax.tree.map(lambda x: x.sharding, state)),
        state=state,
        batch={name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in _BATCH.items()},
    )


def kept_for_gradient(program: Program) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes that the forward pass of one micro-batch keeps for its gradient, without parameters and batch.

    Shapes are global; arrays local to a device are stacked along the first axis.
    """

    def forward(parameters: Parameters, batch: Any) -> list[jax.Array]:
        def nats(parameters: Parameters) -> jax.Array:
            return likelihood_sums(program.apply, parameters, batch, chunks=program.step_config.chunks).nats

        return jax.tree.leaves(jax.vjp(nats, parameters)[1])

    count = program.step_config.accumulate
    batch = {
        name: jax.ShapeDtypeStruct((x.shape[0] // count, *x.shape[1:]), x.dtype) for name, x in program.batch.items()
    }
    with jax.set_mesh(program.mesh):
        jaxpr = jax.make_jaxpr(forward)(program.state.params, batch).jaxpr
    given = set(jaxpr.invars)
    kept = {x: None for x in jaxpr.outvars if isinstance(x, jax.extend.core.Var) and x not in given}
    shapes: list[Any] = [x.aval for x in kept]
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
