"""Data-sheet figures of GPUs and of the links between them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GPU:
    """Data-sheet figures per GPU; bandwidths in bytes per second and direction.

    NVLink connects the 8 GPUs of one HGX board; the network is one port of 400 Gbit/s per GPU, as in a DGX.
    """

    name: str
    memory: float  # bytes
    flops: float  # per second, dense bfloat16 matrix products with float32 accumulation
    memory_bandwidth: float
    nvlink: float = 450e9
    network: float = 50e9


# https://www.nvidia.com/en-us/data-center/h200, https://www.nvidia.com/en-us/data-center/h100 (SXM, half of the
# figures with sparsity) and https://docs.nvidia.com/dgx/dgxh100-user-guide (eight ConnectX-7 ports of 400 Gbit/s).
GPUS = {
    "h100": GPU("NVIDIA H100", memory=80e9, flops=989.5e12, memory_bandwidth=3.35e12),
    "h200": GPU("NVIDIA H200", memory=141e9, flops=989.5e12, memory_bandwidth=4.8e12),
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOP/s of a device by its JAX name, such as "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    return next((gpu.flops for gpu in GPUS.values() if device_kind.startswith(gpu.name)), None)


def gpu(name: str) -> GPU:
    """Return a GPU by name. Raises ValueError, listing the known names."""
    if name not in GPUS:
        raise ValueError(f"gpu: got {name!r}, expected one of {', '.join(sorted(GPUS))}")
    return GPUS[name]
