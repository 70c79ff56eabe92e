"""The plan of a run: its training step compiled for devices that do not have to exist, and the costs that follow."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from osdn_jax import hardware
from osdn_jax._errors import joined_lines
from osdn_jax._versions import installed
from osdn_jax.nn import flops, parameter_formula
from osdn_jax.planning import advice, devices, hlo, memory
from osdn_jax.planning.program import Program, build_program
from osdn_jax.training.config import ConfigError
from osdn_jax.training.model_config import model_name
from osdn_jax.training.tasks import with_task

_REMATS = ("none", "blocks", "full")
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind and group size, in one step.

    Args:
        kind: such as "all-gather".
        members: number of devices in a group.
        across_hosts: True if groups span hosts.
        count: number of executions.
        sent: bytes that each device sends.
        seconds: time at the links' full bandwidth; None if no GPU is named.
    """

    kind: str
    members: int
    across_hosts: bool
    count: int
    sent: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of `plan`. Bytes and FLOPs are per device, tokens and parameters are totals; figures are per step.

    Args:
        topology: HOSTSxDEVICES.
        compiled_for: "gpu" or "cpu": the compiler that temporaries and collectives come from.
        gpu: the GPU whose limits apply, or None.
        mesh: devices along each axis of the mesh.
        rule: `config.model.rule`.
        remat: the remat policy.
        accumulate: micro-batches per step.
        rows: sequences per step.
        length: tokens per sequence.
        parameters: number of parameters.
        formula: number of parameters by `osdn_jax.nn.parameter_formula`.
        parameter_bytes: bytes of all parameters.
        memory: memory by use.
        traffic: collectives by kind and group size.
        uncounted_loops: number of loops with collectives whose length the compiler does not know; they count once.
        flops: FLOPs per token, by formula.
        model_flops: FLOPs without recomputation.
        executed_flops: FLOPs with recomputation.
        compute_seconds: time of `executed_flops` at the GPU's peak rate.
        traffic_seconds: time of the collectives at the links' full bandwidth.
        ceiling: upper bound on the model FLOPs utilisation: collectives overlap with matrix products, and nothing else
            takes time.
        suggestions: estimates of the fastest option of each remat policy that fits in JAX's default allocation, fastest
            first.
        smallest: the option that needs the least memory, by estimate.
        seconds: time to trace and lower, and to compile.
        versions: versions of the packages that matter.
    """

    topology: str
    compiled_for: str
    gpu: hardware.GPU | None
    mesh: dict[str, int]
    rule: str
    remat: str
    accumulate: int
    rows: int
    length: int
    parameters: int
    formula: int
    parameter_bytes: int
    memory: memory.Memory
    traffic: tuple[Traffic, ...]
    uncounted_loops: int
    flops: flops.Flops
    model_flops: float
    executed_flops: float
    compute_seconds: float | None
    traffic_seconds: float | None
    ceiling: float | None
    suggestions: tuple[advice.Option, ...]
    smallest: advice.Option | None
    seconds: dict[str, float]
    versions: dict[str, str]

    @property
    def devices(self) -> int:
        """Number of devices."""
        return devices.parse_topology(self.topology).devices

    @property
    def fits(self) -> bool | None:
        """True if the step fits in the memory that JAX allocates on the GPU by default; None without a GPU."""
        return None if self.gpu is None else self.memory.total <= advice.DEFAULT_MEMORY_FRACTION * self.gpu.memory


def plan(config: ConfigDict, topology: str, gpu: str | None = None) -> Plan:
    """Compile the training step of a run for a topology, and return what it needs. Nothing is run or allocated.

    It is compiled for GPUs if one is named and JAX's CUDA plugin is installed, and for virtual devices of this
    machine's CPU otherwise; then temporaries and collectives are those of the CPU's compiler.

    Args:
        config: the configuration of the run, as of `osdn_jax.training.default_config`.
        topology: HOSTSxGPUS, such as "8x8".
        gpu: a key of `hardware.GPUS`, such as "h200" or "rtx4090"; default None: only what does not depend on a GPU.

    Returns:
        The plan; `report` formats it as text, `as_json` as JSON.

    Raises:
        ConfigError: the topology, the GPU or the configuration is not valid; the message says why.
    """
    try:
        shape = devices.parse_topology(topology)
        chosen = None if gpu is None else hardware.gpu(gpu)
        described = gpu is not None and devices.can_compile_for_gpus()
        targets = devices.described_gpus(shape, gpu) if described and gpu else devices.virtual_devices(shape)
        config = with_task(config)
        program = build_program(config, targets)
        start = time.perf_counter()
        lowered = program.lower()
        middle = time.perf_counter()
        compiled = lowered.compile()
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise ConfigError(str(error)) from error
    except (OverflowError, RuntimeError) as error:  # sizes that overflow in JAX or its compiler
        raise ConfigError(f"a step of this configuration cannot be compiled: {joined_lines(error)}") from error
    seconds = {"lower": middle - start, "compile": time.perf_counter() - middle}

    used = memory.measure(program, compiled)
    found = hlo.parse(compiled.as_text() or "", program.mesh.size)
    hosts = [devices.host_of(device, shape) for device in program.mesh.devices.flat]
    traffic = _traffic(found.collectives, hosts, chosen)
    length = config.sequence_length
    per_token = flops.per_token(program.model, program.state.params, length)
    tokens = config.batch_size * length / program.mesh.size
    model, executed = per_token.training * tokens, {remat: per_token.executed(remat) * tokens for remat in _REMATS}
    remat = program.model.remat
    compute = sending = ceiling = smallest = None
    suggestions: list[advice.Option] = []
    if chosen is not None:
        compute = executed[remat] / chosen.flops
        sending = sum(row.seconds or 0.0 for row in traffic)
        ceiling = model / chosen.flops / max(compute, sending)
        costs = _costs(
            config, targets, program, used, {name: n / chosen.flops for name, n in executed.items()}, sending
        )
        rows = config.batch_size // (program.mesh.shape["data"] * program.mesh.shape["fsdp"])
        suggestions = advice.suggest(costs, rows, advice.DEFAULT_MEMORY_FRACTION * chosen.memory)
        smallest = min(advice.options(costs, rows), key=lambda option: option.memory)
    return Plan(
        topology=str(shape),
        compiled_for="gpu" if described else "cpu",
        gpu=chosen,
        mesh=dict(program.mesh.shape),
        rule=model_name(config),
        remat=remat,
        accumulate=config.accumulate,
        rows=config.batch_size,
        length=length,
        parameters=sum(x.size for x in program.state.params.values()),
        formula=parameter_formula(program.model),
        parameter_bytes=sum(x.size * x.dtype.itemsize for x in program.state.params.values()),
        memory=used,
        traffic=traffic,
        uncounted_loops=found.uncounted_loops,
        flops=per_token,
        model_flops=model,
        executed_flops=executed[remat],
        compute_seconds=compute,
        traffic_seconds=sending,
        ceiling=ceiling,
        suggestions=tuple(suggestions),
        smallest=smallest,
        seconds=seconds,
        versions=installed(_PACKAGES),
    )


def _traffic(found: Sequence[hlo.Collective], hosts: Sequence[int], gpu: hardware.GPU | None) -> tuple[Traffic, ...]:
    rows: dict[tuple[str, int, bool], tuple[int, float, float]] = {}
    for one in found:
        per_host = one.per_host(hosts)
        key = (one.kind, one.members, per_host is not None)
        count, sent, seconds = rows.get(key, (0, 0.0, 0.0))
        rows[key] = (count + one.count, sent + one.sent, seconds + (_seconds(one.sent, per_host, gpu) if gpu else 0.0))
    return tuple(Traffic(*key, count, sent, seconds if gpu else None) for key, (count, sent, seconds) in rows.items())


def _seconds(sent: float, per_host: int | None, gpu: hardware.GPU) -> float:
    # Between hosts, the members on a host share the traffic: one ring for each of their ports, and the link inside.
    return sent / (gpu.link if per_host is None else min(gpu.link, per_host * gpu.network))


def _costs(
    config: ConfigDict,
    targets: list[jax.Device],
    program: Program,
    used: memory.Memory,
    compute: dict[str, float],
    sending: float,
) -> advice.Costs:
    kept: dict[str, int] = {}
    for remat in _REMATS:
        if remat == program.model.remat:
            kept[remat] = used.activations
        else:
            other: Any = config.copy_and_resolve_references()
            other.model.remat = remat
            kept[remat] = memory.activations(build_program(other, targets))
    gradients = min(used.parameters, used.temporaries)
    return advice.Costs(
        accumulate=config.accumulate,
        fixed=used.total - used.activations - used.temporaries + gradients,
        working=used.temporaries - gradients,
        kept=kept,
        compute=compute,
        traffic=sending,
    )
