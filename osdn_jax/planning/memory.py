"""Memory of a training step on each device, by use."""

import dataclasses
import math
from typing import Any

import jax

from osdn_jax.planning.program import Program, kept_for_gradient

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a training step.

    Args:
        parameters: the model's parameters.
        optimizer: the optimiser's state.
        average: the moving average of the parameters, if there is one.
        batch: the tokens of a step.
        activations: arrays that the forward pass of a micro-batch keeps for its gradient, estimated from their shapes.
        temporaries: everything else: gradients, gathered parameters, working memory.
    """

    parameters: int
    optimizer: int
    average: int
    batch: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        """Sum of all uses."""
        return sum(dataclasses.astuple(self))


def measure(program: Program, compiled: jax.stages.Compiled) -> Memory:
    """Return the memory of a compiled step.

    Args:
        program: the step.
        compiled: the same step, compiled.
    """
    state = program.state
    analysis: Any = compiled.memory_analysis()
    # The new state overwrites the old one; outputs that cannot, such as metrics, need memory.
    working = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    kept = activations(program)
    return Memory(
        parameters=on_a_device(state.params),
        optimizer=on_a_device(state.optimizer),
        average=on_a_device(state.ema),
        batch=on_a_device(program.batch),
        activations=min(kept, working),  # the compiler may need less
        temporaries=max(working - kept, 0),
    )


def on_a_device(tree: PyTree) -> int:
    """Return the bytes on each device of arrays or shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def activations(program: Program) -> int:
    """Return the bytes that each device keeps for the gradient of one micro-batch, estimated from shapes.

    Arrays of tokens [B, T, ...] are sharded as the batch is; arrays that a layer keeps per device are stacked along
    their first axis, over all devices.
    """
    sizes = dict(program.mesh.shape)
    rows, time = (program.batch["inputs"].shape[0] // program.step_config.accumulate, program.batch["inputs"].shape[1])
    total = 0.0
    for x in kept_for_gradient(program):
        tokens = x.shape[:2] == (rows, time)
        total += math.prod(x.shape) * x.dtype.itemsize / (program.mesh.size // (sizes["tensor"] if tokens else 1))
    return math.ceil(total)
