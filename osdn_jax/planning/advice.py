"""Estimates of the rematerialisation policies and micro-batches that fit, from one compiled step."""

import dataclasses
from collections.abc import Mapping

# Fractions of a GPU's memory. By default JAX allocates 75 %:
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
DEFAULT_MEMORY_FRACTION = 0.75
# With XLA_PYTHON_CLIENT_MEM_FRACTION; the rest is for the driver, NCCL and fragmentation.
MAX_MEMORY_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a step on each device, by the options that they depend on.

    Args:
        accumulate: micro-batches per step of the step that was compiled.
        fixed: bytes independent of the options: parameters, optimiser, batch, gradients.
        working: bytes of temporaries of one micro-batch.
        kept: bytes that the forward pass of one micro-batch keeps for the gradient, by remat policy.
        compute: seconds of matrix products per step, by remat policy.
        traffic: seconds of collectives per step.
    """

    accumulate: int
    fixed: int
    working: int
    kept: Mapping[str, int]
    compute: Mapping[str, float]
    traffic: float


@dataclasses.dataclass(frozen=True)
class Option:
    """A remat policy and a number of micro-batches, with estimates of their cost.

    Args:
        remat: the policy: none, blocks or full.
        accumulate: micro-batches per step.
        memory: bytes on each device.
        seconds: lower bound on the time of a step.
    """

    remat: str
    accumulate: int
    memory: int
    seconds: float

    @property
    def flags(self) -> str:
        """The flags of `train.py` that select it."""
        return f"--config.model.remat={self.remat} --config.accumulate={self.accumulate}"


def options(costs: Costs, rows: int) -> list[Option]:
    """Return all options, fastest first; ties go to the least computation, then to the fewest micro-batches.

    Temporaries and activations are proportional to the size of a micro-batch; each micro-batch gathers the parameters
    again.

    Args:
        costs: of a compiled step.
        rows: sequences per step on each device.
    """
    found = []
    for accumulate in (n for n in range(1, rows + 1) if rows % n == 0):
        share = costs.accumulate / accumulate
        for remat, kept in costs.kept.items():
            memory = costs.fixed + round((costs.working + kept) * share)
            seconds = max(costs.compute[remat], costs.traffic / share)
            found.append(Option(remat, accumulate, memory, seconds))
    return sorted(found, key=lambda option: (option.seconds, costs.compute[option.remat], option.accumulate))


def suggest(costs: Costs, rows: int, memory: float) -> list[Option]:
    """Return the fastest option of each remat policy that fits, fastest first.

    Args:
        costs: of a compiled step.
        rows: sequences per step on each device.
        memory: bytes available on each device.
    """
    fitting = [option for option in options(costs, rows) if option.memory <= memory]
    return [option for i, option in enumerate(fitting) if option.remat not in {other.remat for other in fitting[:i]}]
