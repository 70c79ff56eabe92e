"""Topologies and GPUs by name."""

import jax
import pytest

from osdn_jax.hardware import GPUS, gpu
from osdn_jax.planning.devices import Topology, described_gpus, host_of, parse_topology, virtual_devices
from pallas_kernels.aot.compiler import targets


def test_topologies():
    assert parse_topology("8x4") == Topology(8, 4)
    assert parse_topology("8x4").devices == 32
    assert str(Topology(8, 4)) == "8x4"


@pytest.mark.parametrize("text", ["8", "0x8", "8x0", "x8", "8x8x8", "-1x8", "8 x 8", "axb", "", "8x8\n", "1e1x8"])
def test_other_topologies_are_refused(text):
    with pytest.raises(ValueError, match="plan: got .*, expected HOSTSxGPUS, such as 1x8"):
        parse_topology(text)


def test_every_gpu_has_a_description_to_compile_for():
    assert sorted(GPUS) == targets()
    assert gpu("h200").memory == 141e9
    with pytest.raises(ValueError, match="gpu: got 'a100', expected one of h100, h200"):
        gpu("a100")


def test_virtual_devices_are_assigned_to_hosts():
    found = virtual_devices(Topology(2, 4))
    assert found == jax.devices("cpu")[:8]
    assert [host_of(device, Topology(2, 4)) for device in found] == [0, 0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="plan: got 2x8, expected at most 8 devices"):
        virtual_devices(Topology(2, 8))


@pytest.mark.parametrize("topology", [Topology(1, 2049), Topology(999999, 999999)])
def test_more_devices_than_there_can_be_are_refused(topology):
    with pytest.raises(ValueError, match=f"plan: got {topology}, .* devices, expected at most 2,048 of a CPU"):
        virtual_devices(topology)


def test_more_gpus_than_can_be_described_are_refused():
    with pytest.raises(ValueError, match="plan: got 8193x8, 65,544 devices, expected at most 65,536"):
        described_gpus(Topology(8193, 8), "h200")
