"""Bytes on each device, by kind."""

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
        parameters, optimizer, average: the state; average is the parameters' moving average, if there is one.
        batch: the tokens.
        activations: what the forward pass of a micro-batch leaves for its gradient, counted from its shapes.
        temporaries: all else that the compiler needs: gradients, gathered parameters, working memory.
    """

    parameters: int
    optimizer: int
    average: int
    batch: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(dataclasses.astuple(self))


def measure(program: Program, compiled: jax.stages.Compiled) -> Memory:
    """The memory of a compiled step."""
    state = program.state
    analysis: Any = compiled.memory_analysis()
    # The new state takes the place of the old one; what cannot, such as metrics, is new.
    working = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    kept = activations(program)
    return Memory(
        parameters=on_a_device(state.params),
        optimizer=on_a_device(state.optimizer),
        average=on_a_device(state.ema),
        batch=on_a_device(program.batch),
        activations=min(kept, working),  # the compiler may find that it can do with less
        temporaries=max(working - kept, 0),
    )


def on_a_device(tree: PyTree) -> int:
    """Bytes that each device has of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def activations(program: Program) -> int:
    """Bytes that each device keeps for the gradient of one micro-batch, estimated from shapes.

    An array of tokens [B, T, ...] is split as they are; what a layer keeps on each device is split over all of them.
    """
    sizes = dict(program.mesh.shape)
    rows, time = (program.batch["inputs"].shape[0] // program.step_config.accumulate, program.batch["inputs"].shape[1])
    total = 0.0
    for x in kept_for_gradient(program):
        tokens = x.shape[:2] == (rows, time)
        total += math.prod(x.shape) * x.dtype.itemsize / (program.mesh.size // (sizes["tensor"] if tokens else 1))
    return math.ceil(total)
