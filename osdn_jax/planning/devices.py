"""Devices to compile for, that need not be here: described GPUs, or virtual devices of this machine's CPU."""

import re
from typing import NamedTuple

import jax

from pallas_kernels.aot import compiler

MOST_DESCRIBED = 65_536
MOST_VIRTUAL = 2_048  # the CPU's compiler takes one with a number above that for another process's


class Topology(NamedTuple):
    """Hosts, and the devices of each."""

    hosts: int
    per_host: int

    @property
    def devices(self) -> int:
        """Of all hosts."""
        return self.hosts * self.per_host

    def __str__(self) -> str:
        """As `parse_topology` reads it."""
        return f"{self.hosts}x{self.per_host}"


def parse_topology(text: str) -> Topology:
    """HOSTSxDEVICES, such as 8x8. Raises ValueError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if match is None:
        raise ValueError(f"plan: got {text!r}, expected HOSTSxGPUS, such as 1x8 or 8x8")
    return Topology(int(match[1]), int(match[2]))


def can_compile_for_gpus() -> bool:
    """Whether JAX's CUDA plugin is installed: `pip install 'osdn-jax[gpu]'`. It needs no GPU."""
    return compiler.has_plugin()


def described_gpus(topology: Topology, gpu: str) -> list[jax.Device]:
    """GPUs that are only described; programs can be compiled for them and not run.

    gpu is a key of `hardware.GPUS`. This process's own devices are its CPU, whatever it has: call it first of all.

    Raises ValueError for more than MOST_DESCRIBED.
    """
    _check_count(topology, MOST_DESCRIBED, "")
    jax.config.update("jax_platforms", "cpu")
    compiler.prepare_compiler()
    return compiler.described_devices(gpu, *topology)


def virtual_devices(topology: Topology) -> list[jax.Device]:
    """Devices of this machine's CPU. Raises ValueError for more than MOST_VIRTUAL, or if JAX has started with fewer."""
    _check_count(topology, MOST_VIRTUAL, " of a CPU")
    jax.config.update("jax_platforms", "cpu")
    try:
        jax.config.update("jax_num_cpu_devices", topology.devices)
    except RuntimeError:  # JAX has started, with as many as it has
        pass
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise ValueError(f"plan: got {topology}, expected at most {len(devices)} devices: JAX has started with so many")
    return devices[: topology.devices]


def _check_count(topology: Topology, most: int, kind: str) -> None:
    if topology.devices > most:
        raise ValueError(f"plan: got {topology}, {topology.devices:,} devices, expected at most {most:,}{kind}")


def host_of(device: jax.Device, topology: Topology) -> int:
    """The host of a device; virtual ones are all of one process, and dealt to hosts in their order."""
    return device.id // topology.per_host
