"""Whole plans of small models, for virtual devices."""

import dataclasses
import json
import runpy
import subprocess

import jax
import jax.numpy as jnp
import pytest

from osdn_jax import planning
from osdn_jax.hardware import GPUS
from osdn_jax.nn import parameter_formula
from osdn_jax.planning import advice, devices, planner
from osdn_jax.planning.memory import activations, on_a_device
from osdn_jax.planning.planner import Plan
from osdn_jax.planning.program import build_program
from osdn_jax.training import ConfigError, default_config
from support.runs import ROOT, command, run, scratch

MESHES = {"fsdp": {"fsdp": 8}, "fsdp, tensor": {"fsdp": 4, "tensor": 2}, "data, context": {"data": 2, "context": 4}}


def small(rule="osdn", mesh=None, **changes):
    config = default_config()
    config.model.update({"rule": rule, "layers": 2, "width": 32, "heads": 2, "mlp_dim": 48})
    config.update({"batch_size": 16, "sequence_length": 64})
    config.validation.update({"batch_size": 8, "sequence_length": 64})
    config.mesh.update({"fsdp": -1} if mesh is None else MESHES[mesh])
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def made():
    config = small(accumulate=2, model__remat="full")
    there = devices.can_compile_for_gpus
    devices.can_compile_for_gpus = lambda: False
    try:
        return planning.plan(config, "2x4", "h200")
    finally:
        devices.can_compile_for_gpus = there


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("rule", ["delta_net", "osdn", "os_kda", "pgdn", "transformer"])
def test_parameters_are_those_of_the_formula(rule, mesh):
    program = build_program(small(rule, mesh), jax.devices())
    parameters, sizes = program.state.params, dict(program.mesh.shape)
    count = sum(x.size for x in parameters.values())
    assert count == parameter_formula(program.model)
    # Parameters that are not sharded, such as norms, are on every device.
    split = {name: x.size // x.sharding.shard_shape(x.shape)[0] for name, x in parameters.items() if x.ndim == 1}
    assert on_a_device(parameters) >= 4 * count / (sizes["fsdp"] * sizes["tensor"])
    whole = sum(x.size for x in parameters.values() if x.sharding.is_fully_replicated)
    assert on_a_device(parameters) <= 4 * ((count - whole) / min(n for n in (8, 4, 2, 1) if _splits(n, sizes)) + whole)
    assert split
    assert on_a_device(program.state.optimizer) == 2 * on_a_device(parameters) + 8  # two moments, two counts


def _splits(n, sizes):
    return n in (sizes["fsdp"] * sizes["tensor"], sizes["fsdp"], sizes["tensor"])


@pytest.mark.parametrize("name", ["lm_340m", "lm_1b"])
def test_the_papers_models_have_the_bytes_of_the_formula(name):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]("rule=osdn")
    program = build_program(config, jax.devices())
    total = sum(x.size * x.dtype.itemsize for x in program.state.params.values())
    assert total == 4 * parameter_formula(program.model)


def test_bytes_kept_for_the_gradient():
    kept = {remat: activations(build_program(small(model__remat=remat), jax.devices())) for remat in REMATS}
    assert kept["full"] < kept["blocks"] < kept["none"]
    halves = activations(build_program(small(model__remat="full", accumulate=2), jax.devices()))
    streams = 2 * 64 * 32 * 4  # a device's two rows: the input of each of two blocks, and the output of the last
    assert kept["full"] - halves >= 3 * streams / 2
    head = 256 * 32 * 4  # replicated on every device
    assert kept["full"] < 8 * streams + head


REMATS = ("none", "blocks", "full")


def test_a_plan_of_a_small_model(made):
    assert (made.compiled_for, made.topology, made.devices, made.mesh["fsdp"]) == ("cpu", "2x4", 8, 8)
    assert made.parameters == made.formula
    assert made.parameter_bytes == 4 * made.formula
    assert made.fits
    assert made.uncounted_loops == 0
    assert min(made.memory.parameters, made.memory.activations, made.memory.temporaries) > 0
    assert made.memory.average == 0
    assert made.memory.total < 10e6
    assert {row.kind for row in made.traffic} >= {"all-gather", "all-reduce"}
    assert all(row.across_hosts and row.members == 8 for row in made.traffic)
    gathers = sum(row.count for row in made.traffic if row.kind == "all-gather")
    assert gathers >= 2 * 2 * 2 * 3  # micro-batches, passes, blocks; matrices of each
    assert 0 < made.ceiling < 1
    tokens = 16 * 64 / 8
    assert made.model_flops == made.flops.training * tokens
    assert made.compute_seconds == made.executed_flops / GPUS["h200"].flops
    assert made.ceiling == pytest.approx(
        made.model_flops / GPUS["h200"].flops / max(made.compute_seconds, made.traffic_seconds)
    )
    assert [option.remat for option in made.suggestions] == ["none", "blocks", "full"]


def test_the_report_says_what_it_was_compiled_for(made):
    said = planning.report(made)
    first = said.splitlines()[0]
    assert first.startswith("Compiled for 8 devices of this machine's CPU (2x4), not for GPUs")
    assert "CUDA plugin is missing" in first
    assert f"osdn: {made.formula:,} parameters, as by formula, {4 * made.formula:,} bytes" in said
    assert "It fits: " in said
    assert "--config.model.remat=none --config.accumulate=1 " in said
    assert max(map(len, said.splitlines()[1:])) <= 140
    assert json.loads(planning.as_json(made))["memory"]["parameters"] == made.memory.parameters


def test_the_report_of_what_does_not_fit(made):
    def with_memory(memory, suggestions=()):
        gpu = GPUS["h200"].__class__("small", memory, 1e12, 1e12)
        return planning.report(Plan(**{**vars(made), "gpu": gpu, "suggestions": suggestions}))

    total = made.memory.total
    assert "It does not fit" in with_memory(total / 0.95)
    assert "No remat and micro-batch fits by estimate (the least, --config.model" in with_memory(total / 0.95)
    assert "Fits only with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92: " in with_memory(total / 0.9)
    option = advice.Option("full", 4, 1, 1.0)
    assert "--config.model.remat=full --config.accumulate=4" in with_memory(total / 0.95, (option,))


def test_the_report_names_the_gpus_that_it_was_compiled_for(made):
    def first_line(topology):
        return planning.report(Plan(**{**vars(made), "compiled_for": "gpu", "topology": topology})).splitlines()[0]

    assert first_line("1x8") == "Compiled for 8 × NVIDIA H200 (1 host × 8); no GPU required."
    assert first_line("8x8") == "Compiled for 64 × NVIDIA H200 (8 hosts × 8); no GPU required."


@pytest.mark.parametrize(
    ("topology", "across", "seconds_per_gb"), [("1x8", None, 1 / 32), ("2x4", 4, 1 / 32), ("8x1", 1, 0.08)]
)
def test_collectives_without_nvlink_take_the_time_of_pcie(topology, across, seconds_per_gb):
    # 4 members of a group on a host share 4 ports of 12.5 GB/s, more than the slot of each; one member has one port.
    assert planner._seconds(1e9, across, GPUS["rtx4090"]) == pytest.approx(seconds_per_gb)


@pytest.mark.parametrize(
    ("name", "topology", "over", "links"),
    [
        (
            "rtx3090",
            "1x8",
            "PCIe",
            "PCIe at 32 GB/s and direction, between hosts 12.5 GB/s for each GPU, an assumption",
        ),
        ("a100", "1x8", "NVLink", "NVLink at 300 GB/s and direction, between hosts 25 GB/s for each GPU"),
        ("h200", "2x4", "hosts", "NVLink at 450 GB/s and direction, between hosts 50 GB/s for each GPU"),
    ],
)
def test_the_report_names_the_links(made, name, topology, over, links):
    traffic = tuple(dataclasses.replace(row, across_hosts=over == "hosts") for row in made.traffic)
    lines = planning.report(dataclasses.replace(made, gpu=GPUS[name], topology=topology, traffic=traffic)).splitlines()
    assert f"  {links}" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("collectives per step")) + 1
    assert [line.split()[2] for line in lines[start : start + len(traffic)]] == [over] * len(traffic)


@pytest.mark.parametrize(
    ("topology", "gpu", "changes", "said"),
    [
        ("8", None, {}, "plan: got '8', expected HOSTSxGPUS"),
        ("1x8", "v100", {}, "gpu: got 'v100', expected one of a100, a100-40gb, a6000, h100, h200, l4, "),
        ("1x8", None, {"mesh__fsdp": 1}, "1 in all, expected the 8 devices of the plan; --config.mesh.fsdp=-1"),
        ("1x8", None, {"mesh__fsdp": 3}, "3 in all, expected the 8 devices"),
        ("1x6", None, {}, "batch_size / accumulate: got 16, expected a multiple of mesh.data × mesh.fsdp = 6"),
        ("1x8", None, {"accumulate": 4}, "batch_size / accumulate: got 4, expected a multiple"),
        ("2x8", None, {}, "plan: got 2x8, expected at most 8 devices"),
        ("999999x999999", None, {}, "plan: got 999999x999999, 999,998,000,001 devices, expected at most 2,048"),
        ("1x8", None, {"model__rule": "osnd"}, "osnd"),
        ("1x8", None, {"batch_size": 0}, "batch_size: got 0, expected at least 1"),
        ("1x8", None, {"sequence_length": -64}, "sequence_length: got -64, expected at least 1"),
        ("1x8", None, {"accumulate": 0}, "accumulate: got 0, expected at least 1"),
        (
            "1x1",
            None,
            {"mesh__fsdp": 1, "batch_size": 2**31},
            "got 2147483648 x 64 tokens a step, expected fewer than 2,",
        ),
        ("1x1", None, {"mesh__fsdp": 1, "sequence_length": 2**32}, "got 16 x 4294967296 tokens a step, expected fewer"),
        ("1x1", None, {"mesh__fsdp": 1, "model__width": 10**9}, "this configuration cannot be compiled: .*overflow"),
    ],
)
def test_mistakes(topology, gpu, changes, said):
    with pytest.raises(ConfigError, match=said):
        planning.plan(small(**changes), topology, gpu)


def test_one_device_needs_no_mesh():
    made = planning.plan(small(mesh__fsdp=1, model__layers=1), "1x1")
    assert (made.traffic, made.ceiling, made.fits) == ((), None, None)
    said = planning.report(made)
    assert "no collectives" in said
    assert "--gpu=h200" in said


def test_a_file_that_cannot_be_written_is_refused_first():
    done = run(None, "--plan=1x1", "--plan_json=nothing/plan.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "train.py: error: --plan_json: got 'nothing/plan.json', but there is no folder 'nothing'\n"


@pytest.mark.slow
def test_the_command_line():
    line, keywords = command(None, "--plan=1x2", "--config.mesh.fsdp=-1", "--plan_json=plan.json", cached=False)
    done = subprocess.run(line, check=False, capture_output=True, timeout=120, **keywords)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Compiled for 2 devices of this machine's CPU (1x2), not for GPUs (--gpu=h200 does).")
    written = json.loads((scratch() / "plan.json").read_text())
    assert written["parameters"] == written["formula"]


def test_the_batch_is_that_of_the_data():
    from osdn_jax.data import PackedWindows, shakespeare, training_batches

    program = build_program(small(), jax.devices())
    window = next(training_batches(PackedWindows(shakespeare("validation"), 64), batch_size=16, seed=0))
    shapes = {name: (x.shape, jnp.dtype(x.dtype)) for name, x in window.items()}
    assert {name: (x.shape, jnp.dtype(x.dtype)) for name, x in program.batch.items()} == shapes
