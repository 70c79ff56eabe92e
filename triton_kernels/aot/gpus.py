"""The GPUs that the kernels are compiled for by name, and what one multiprocessor of them holds."""

from typing import NamedTuple

from pallas_kernels.aot.occupancy import Multiprocessor
from triton_kernels.common.cards import SHARED_MEMORY


class GPU(NamedTuple):
    """A GPU model.

    Attributes:
        capability: compute capability times 10.
        multiprocessors: that are enabled.
        device_kind: the name that JAX has for it.
    """

    capability: int
    multiprocessors: int
    device_kind: str

    @property
    def shared_memory(self) -> int:
        """Return the bytes of shared memory that a block may have."""
        return SHARED_MEMORY[self.capability]

    @property
    def multiprocessor(self) -> Multiprocessor:
        """Return the limits of one multiprocessor."""
        return _MULTIPROCESSORS[self.capability]


# NVIDIA's architecture white papers: A100 Tensor Core GPU, Ampere GA102, Ada GPU, L40S data sheet, H100 (SXM5).
GPUS = {
    "a100": GPU(80, 108, "NVIDIA A100-SXM4-80GB"),
    "rtx3090": GPU(86, 82, "NVIDIA GeForce RTX 3090"),
    "rtx4090": GPU(89, 128, "NVIDIA GeForce RTX 4090"),
    "l40s": GPU(89, 142, "NVIDIA L40S"),
    "h100": GPU(90, 132, "NVIDIA H100 80GB HBM3"),
}

# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
_MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared_memory=167936),
    86: Multiprocessor(warps=48, blocks=16, shared_memory=102400),
    89: Multiprocessor(warps=48, blocks=24, shared_memory=102400),
    90: Multiprocessor(warps=64, blocks=32, shared_memory=233472),
}
