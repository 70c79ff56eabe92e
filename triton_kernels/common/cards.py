"""Compute capability and shared memory of NVIDIA GPUs, by the name JAX gives them."""

import re
from typing import Any

import jax

OLDEST = 80  # compute capability times 10; older tensor cores have no bfloat16

# Bytes of shared memory that a block may have, by compute capability times 10: CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability", less the 1 KB that the system reserves.
SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}

# https://developer.nvidia.com/cuda-gpus. A GPU that is present is asked; the names serve programs that are compiled for
# GPUs that are not.
_NAMES = {
    70: r"V100|TITAN V\b",
    75: r"\bT4\b|RTX 20\d\d|QUADRO RTX|GTX 16\d\d",
    80: r"\bA100|\bA800|\bA30\b",
    86: r"RTX 30\d\d|\bA10G?\b|\bA16\b|\bA40\b|\bA2\b|RTX A\d{4}",
    89: r"RTX 40\d\d|\bL4\b|\bL40S?\b|RTX (?:[4-6]000|5880) ADA",
    90: r"GH200|\bH20\b|\bH100|\bH200|\bH800",
    100: r"\bGB200|\bB100|\bB200",
    103: r"\bGB300|\bB300",
    120: r"RTX 50\d\d|RTX PRO \d{4}",
}


def shared_memory(capability: int) -> int:
    """Return the bytes of shared memory that a block may have; of an unknown GPU the least that any known one has."""
    return SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))


def capability_of(device: Any) -> int | None:
    """Return the compute capability of a device times 10, such as 89; None if it is no NVIDIA GPU that is known.

    Args:
        device: a `jax.Device`, or the abstract device of a mesh that describes GPUs that are not there.
    """
    if device.platform not in ("gpu", "cuda"):
        return None
    found = getattr(device, "compute_capability", None)
    if found is not None:
        version = re.fullmatch(r"(\d+)\.(\d)", str(found))  # of an AMD GPU it is a name such as gfx942
        return version and 10 * int(version[1]) + int(version[2])
    kind = device.device_kind.upper()
    return next((capability for capability, names in _NAMES.items() if re.search(names, kind)), None)


def device_in_use() -> Any:
    """Return the device that a program traced now is for: that of the mesh in use, else the first of this process."""
    ambient = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if ambient is None else ambient
