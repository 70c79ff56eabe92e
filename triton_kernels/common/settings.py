"""The fixed settings of every kernel, as one table: no user waits for an autotuner, and every run is the same.

Chosen by what the assembler says (`python -m triton_kernels.aot`): no spills in inner loops and as few registers as
that takes. No GPU has timed them.
"""

from typing import NamedTuple

from triton_kernels.common.target import Target


class Settings(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        block: channels that a program holds at once, of keys or of values; what it means is the kernel's.
        warps: per program.
        stages: of the software pipeline of its loop.
    """

    block: int
    warps: int = 4
    stages: int = 1


# By kernel, then by (bits of the inputs, head dimension): K, for a loop over values V.
TABLE: dict[str, dict[tuple[int, int], Settings]] = {}

# What differs on some GPUs, by compute capability times 10.
OVERRIDES: dict[int, dict[str, dict[tuple[int, int], Settings]]] = {}


def settings(kernel: str, target: Target, bits: int, size: int) -> Settings:
    """Return the settings of a kernel.

    Args:
        kernel: its name.
        target: what it runs on.
        bits: of the type of the inputs, 16 or 32.
        size: the head dimension that the kernel's entry is keyed by.
    """
    special = OVERRIDES.get(target.capability, {}).get(kernel, {})
    return special.get((bits, size)) or TABLE[kernel][bits, size]
