"""Topologies and GPUs by name."""

import re

import jax
import pytest

from osdn_jax.hardware import GPUS, gpu, gpu_of, peak_flops
from osdn_jax.planning.devices import Topology, described_gpus, host_of, parse_topology, virtual_devices
from pallas_kernels.aot import compiler


def test_topologies():
    assert parse_topology("8x4") == Topology(8, 4)
    assert parse_topology("8x4").devices == 32
    assert str(Topology(8, 4)) == "8x4"


@pytest.mark.parametrize("text", ["8", "0x8", "8x0", "x8", "8x8x8", "-1x8", "8 x 8", "axb", "", "8x8\n", "1e1x8"])
def test_other_topologies_are_refused(text):
    with pytest.raises(ValueError, match="plan: got .*, expected HOSTSxGPUS, such as 1x8"):
        parse_topology(text)


NAMES = "a100, a100-40gb, a6000, h100, h200, l4, l40s, rtx3090, rtx4090"
# FLOPs of dense bfloat16 products with float32 accumulation, per multiprocessor and cycle; GeForce cards have half.
PER_CYCLE = {"h": 4096, "a100": 2048, "a6000": 1024, "rtx": 512, "l": 1024}


def test_every_gpu_has_a_description_to_compile_for():
    assert sorted(GPUS) == compiler.described() == NAMES.split(", ")
    assert gpu("h200").memory == 141e9
    with pytest.raises(ValueError, match=f"gpu: got 'v100', expected one of {NAMES}"):
        gpu("v100")


@pytest.mark.parametrize("name", GPUS)
def test_the_figures_agree_with_the_description_that_the_compiler_uses(name):
    text = compiler.description(name)
    kind = re.search(r'device_description_str: "(.*)"', text)[1]
    assert gpu_of(kind) is GPUS[name]
    assert peak_flops(kind) == GPUS[name].flops
    found = {field: float(value) for field, value in re.findall(r"^  (\w+): ([\d.]+)$", text, re.MULTILINE)}
    assert GPUS[name].memory_bandwidth == pytest.approx(found["memory_bandwidth"], rel=1e-2)
    assert 0.9 * found["device_memory_size"] <= GPUS[name].memory <= found["device_memory_size"]
    per_cycle = next(n for prefix, n in PER_CYCLE.items() if name.startswith(prefix))
    at_full_clock = per_cycle * found["core_count"] * found["clock_rate_ghz"] * 1e9
    # The tensor cores of Hopper reach 1.83 GHz, those of the L40S by its data sheet 2.49.
    assert GPUS[name].flops == pytest.approx(at_full_clock, rel=0.08 if name.startswith("h") else 0.015)
    assert found["shared_memory_per_core"] - found["shared_memory_per_block_optin"] == 1024


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_cards_of_similar_names_have_figures_of_their_own(kind, flops):
    assert peak_flops(kind) == flops


def test_links_without_nvlink_are_those_of_the_slot():
    assert (GPUS["a100"].link, GPUS["a100"].link_name) == (300e9, "NVLink")
    assert (GPUS["rtx4090"].link, GPUS["rtx4090"].link_name) == (32e9, "PCIe")


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
