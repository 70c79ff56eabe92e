"""Data-sheet figures of GPUs and of the links between them."""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class GPU:
    """Data-sheet figures per GPU; bandwidths in bytes per second and direction.

    Args:
        name: as its maker spells it.
        memory: bytes.
        flops: per second, of dense bfloat16 matrix products with float32 accumulation. GeForce cards have half the rate
            of their data sheets, which is that of float16 accumulation.
        memory_bandwidth: of the device's memory.
        nvlink: between the GPUs of one host; None if they are only connected by PCIe. NVLink bridges, which connect
            pairs of some PCIe cards, are not counted.
        network: between hosts, for each GPU.
        pcie: of the slot, 16 lanes.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    nvlink: float | None = 450e9
    network: float = 50e9
    pcie: float = 64e9

    @property
    def link(self) -> float:
        """Bandwidth between the GPUs of one host."""
        return self.pcie if self.nvlink is None else self.nvlink

    @property
    def link_name(self) -> str:
        """Name of the connection between the GPUs of one host."""
        return "PCIe" if self.nvlink is None else "NVLink"


# Between GPUs without NVLink: PCIe 4.0 with 16 lanes, 64 GB/s in both directions together. Their data sheets name no
# network: one port of 100 Gbit/s for each GPU is an assumption.
_PCIE_4: dict[str, Any] = {"nvlink": None, "network": 12.5e9, "pcie": 32e9}

# H100, H200: https://www.nvidia.com/en-us/data-center/h200, https://www.nvidia.com/en-us/data-center/h100 (SXM, half of
#   the figures with sparsity), https://docs.nvidia.com/dgx/dgxh100-user-guide (eight ConnectX-7 ports of 400 Gbit/s).
# A100: https://www.nvidia.com/en-us/data-center/a100 (SXM: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s in both directions
#   together); of 40 GB: NVIDIA A100 Tensor Core GPU Architecture, whitepaper, table 4 (1,555 GB/s). Network:
#   https://docs.nvidia.com/dgx/dgxa100-user-guide (eight ConnectX ports of 200 Gbit/s).
# RTX 3090, RTX A6000: NVIDIA Ampere GA102 GPU Architecture, whitepaper 2.0, appendices A and C (rows "Peak BF16 Tensor
#   TFLOPS with FP32 Accumulate", 71 and 154.8, and "Memory Bandwidth", 936 and 768 GB/s).
# RTX 4090: NVIDIA Ada GPU Architecture, whitepaper 2.01, appendix A (165.2 and 1,008 GB/s in the same rows).
# L40S: https://www.nvidia.com/en-us/data-center/l40s (362.05 TFLOP/s, 864 GB/s, PCIe Gen4 x16: 64 GB/s bidirectional).
# L4: https://www.nvidia.com/en-us/data-center/l4 (242 TFLOP/s with sparsity, 300 GB/s, PCIe Gen4 x16).
# Memory is that of the data sheet, or what CUDA reports where error correction leaves less: L40S, L4.
GPUS = {
    "h100": GPU("NVIDIA H100", memory=80e9, flops=989.5e12, memory_bandwidth=3.35e12),
    "h200": GPU("NVIDIA H200", memory=141e9, flops=989.5e12, memory_bandwidth=4.8e12),
    "a100": GPU("NVIDIA A100 80GB", 80e9, 312e12, 2.039e12, nvlink=300e9, network=25e9, pcie=32e9),
    "a100-40gb": GPU("NVIDIA A100 40GB", 40e9, 312e12, 1.555e12, nvlink=300e9, network=25e9, pcie=32e9),
    "a6000": GPU("NVIDIA RTX A6000", 48e9, 154.8e12, 768e9, **_PCIE_4),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", 24e9, 71e12, 936e9, **_PCIE_4),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 24e9, 165.2e12, 1.008e12, **_PCIE_4),
    "l40s": GPU("NVIDIA L40S", 47.5e9, 362.05e12, 864e9, **_PCIE_4),
    "l4": GPU("NVIDIA L4", 23.6e9, 121e12, 300e9, **_PCIE_4),
}

# By the names that JAX gives devices. Cards of similar names have other figures: RTX 3090 Ti, RTX 4090 D, H100 NVL,
# L40, laptops, and parts of a GPU (MIG). PCIe variants: the data sheets of the A100 and the H100.
_KINDS = {
    r"NVIDIA H100 (?!PCIe|NVL).*": GPUS["h100"],
    r"NVIDIA H100 PCIe": GPU("NVIDIA H100 PCIe", 80e9, 756e12, 2e12, nvlink=None),
    r"NVIDIA H200": GPUS["h200"],
    r"NVIDIA A100-SXM4-80GB": GPUS["a100"],
    r"NVIDIA A100-SXM4-40GB": GPUS["a100-40gb"],
    r"NVIDIA A100 80GB PCIe": GPU("NVIDIA A100 80GB PCIe", 80e9, 312e12, 1.935e12, **_PCIE_4),
    r"NVIDIA A100-PCIE-40GB": GPU("NVIDIA A100 40GB PCIe", 40e9, 312e12, 1.555e12, **_PCIE_4),
} | {re.escape(GPUS[name].name): GPUS[name] for name in ("a6000", "rtx3090", "rtx4090", "l40s", "l4")}


def gpu_of(device_kind: str) -> GPU | None:
    """Return the figures of a device by the name that JAX gives it; None if it is unknown.

    Example:
        >>> gpu_of("NVIDIA A100-SXM4-40GB").memory_bandwidth
        1555000000000.0
    """
    if " MIG " in device_kind:
        return None
    return next((gpu for kind, gpu in _KINDS.items() if re.fullmatch(kind, device_kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOP/s of a device by its JAX name, such as "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    found = gpu_of(device_kind)
    return None if found is None else found.flops


def gpu(name: str) -> GPU:
    """Return a GPU by name. Raises ValueError, listing the known names."""
    if name not in GPUS:
        raise ValueError(f"gpu: got {name!r}, expected one of {', '.join(sorted(GPUS))}")
    return GPUS[name]
