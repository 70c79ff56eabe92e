"""Devices to compile for: described GPUs, which do not have to exist, or virtual devices of this machine's CPU."""

import re
from typing import NamedTuple

import jax

from pallas_kernels.aot import compiler

MAX_DESCRIBED = 65_536
MAX_VIRTUAL = 2_048  # the CPU's compiler takes devices with higher numbers for those of another process


class Topology(NamedTuple):
    """A number of hosts, and of devices per host."""

    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        """Number of devices in total."""
        return self.hosts * self.per_host

    def __str__(self) -> str:
        """Format it as `parse_topology` reads it."""
        return f"{self.hosts}x{self.per_host}"


def parse_topology(text: str) -> Topology:
    """Parse HOSTSxDEVICES.

    Raises:
        ValueError: the text is anything else.

    Example:
        >>> parse_topology("8x4").devices
        32
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise ValueError(f"plan: got {text!r}, expected HOSTSxGPUS, such as 1x8 or 8x8")
    return Topology(int(match[1]), int(match[2]))


def can_compile_for_gpus() -> bool:
    """Return True if JAX's CUDA plugin is installed (the extra `gpu`). It needs no GPU."""
    return compiler.has_plugin()


def described_gpus(topology: Topology, gpu: str) -> list[jax.Device]:
    """Return GPUs that programs can be compiled for, but not run on.

    This process can then use its CPU only, so call it before JAX is used for anything else.

    Args:
        topology: the hosts and the GPUs of each.
        gpu: a key of `hardware.GPUS`.

    Raises:
        ValueError: there are more than MAX_DESCRIBED.
    """
    _check_count(topology, MAX_DESCRIBED, "")
    jax.config.update("jax_platforms", "cpu")
    compiler.prepare_compiler()
    return compiler.described_devices(gpu, *topology)


def virtual_devices(topology: Topology) -> list[jax.Device]:
    """Return virtual devices of this machine's CPU.

    Args:
        topology: the hosts and the devices of each.

    Raises:
        ValueError: there are more than MAX_VIRTUAL, or JAX has already started with fewer.
    """
    _check_count(topology, MAX_VIRTUAL, " of a CPU")
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", topology.devices)
    except RuntimeError:  # JAX has already started, and its number of devices is fixed
        pass
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise ValueError(
            f"plan: got {topology}, expected at most {len(devices)} devices: JAX has already started with that many"
        )
    return devices[: topology.devices]


def _check_count(topology: Topology, most: int, of: str) -> None:
    if topology.devices > most:
        raise ValueError(f"plan: got {topology}, {topology.devices:,} devices, expected at most {most:,}{of}")


def host_of(device: jax.Device, topology: Topology) -> int:
    """Return the host of a device; virtual devices, all of one process, are assigned to hosts in order."""
    return device.id // topology.per_host
