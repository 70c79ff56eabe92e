"""What is to be known of a GPU and of the links between GPUs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GPU:
    """Figures of the maker, per GPU; bandwidths in bytes per second and per direction.

    NVLink is that of the 8 GPUs of one HGX board; the network is one port of 400 Gbit/s beside each GPU, as in a DGX.
    """

    name: str
    memory: float  # bytes
    flops: float  # per second, dense bfloat16 products with float32 sums
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
    """Of a device by JAX's name for it, such as "NVIDIA H100 80GB HBM3"; None where it is not known."""
    return next((gpu.flops for gpu in GPUS.values() if device_kind.startswith(gpu.name)), None)


def gpu(name: str) -> GPU:
    """A GPU by name. Raises ValueError, with the names that there are."""
    if name not in GPUS:
        raise ValueError(f"gpu: got {name!r}, expected one of {', '.join(sorted(GPUS))}")
    return GPUS[name]
