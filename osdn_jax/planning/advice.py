"""Which rematerialisation and micro-batch fit, by estimate from a step that was compiled."""

import dataclasses
from collections.abc import Mapping

DEFAULT_MEMORY_FRACTION = (
    0.75  # of a GPU's memory: what JAX takes, https://docs.jax.dev/en/latest/gpu_memory_allocation.html
)
MAX_MEMORY_FRACTION = (
    0.92  # with XLA_PYTHON_CLIENT_MEM_FRACTION; the rest is the driver's, NCCL's and what is lost in gaps
)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a step costs each device, and what of that depends on which choice.

    Args:
        accumulate: parts of a batch, of the step that was compiled.
        fixed: bytes whatever is chosen: parameters, optimiser, batch, gradients.
        working: bytes of temporaries of one part.
        kept: bytes that the forward pass of one part leaves for the gradient, by rematerialisation.
        compute: seconds of a step's products, by rematerialisation.
        traffic: seconds of its collectives.
    """

    accumulate: int
    fixed: int
    working: int
    kept: Mapping[str, int]
    compute: Mapping[str, float]
    traffic: float


@dataclasses.dataclass(frozen=True)
class Option:
    """A choice, and what it is estimated to cost: bytes on each device, and seconds of a step at least."""

    remat: str
    accumulate: int
    memory: int
    seconds: float

    @property
    def flags(self) -> str:
        """As `train.py` takes them."""
        return f"--config.model.remat={self.remat} --config.accumulate={self.accumulate}"


def options(costs: Costs, rows: int) -> list[Option]:
    """All choices, the fastest first, and of equally fast ones that which computes least, in the fewest parts.

    Parts share temporaries and activations in proportion; each part gathers the parameters anew.

    Args:
        costs: of a step that was compiled.
        rows: sequences of a step on each device.
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
    """Of each rematerialisation the fastest choice within so many bytes, in their order; none where nothing fits."""
    fitting = [option for option in options(costs, rows) if option.memory <= memory]
    return [option for i, option in enumerate(fitting) if option.remat not in {other.remat for other in fitting[:i]}]
