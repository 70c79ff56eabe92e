"""Plans as text and as JSON."""

import dataclasses
import json

from osdn_jax.planning import advice
from osdn_jax.planning.planner import Plan

_MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimiser",
    "average": "moving average",
    "batch": "batch",
    "activations": "activations (estimate)",
    "temporaries": "temporaries",
}


def report(plan: Plan) -> str:
    """Format a plan for a terminal, in about thirty lines.

    Args:
        plan: the result of `osdn_jax.planning.plan`.
    """
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_traffic(plan), "", *_compute(plan), "", *_advice(plan)])


def as_json(plan: Plan) -> str:
    """Format all figures of a plan as a JSON object; its keys are the fields of `Plan` and "fits".

    Args:
        plan: the result of `osdn_jax.planning.plan`.
    """
    return json.dumps(dataclasses.asdict(plan) | {"fits": plan.fits}, indent=2) + "\n"


def _head(plan: Plan) -> list[str]:
    count = f"{plan.devices} devices" if plan.devices > 1 else "1 device"
    if plan.compiled_for == "gpu" and plan.gpu is not None:
        hosts, per_host = plan.topology.split("x")
        layout = f"{hosts} host{'' if hosts == '1' else 's'} × {per_host}"
        first = f"Compiled for {plan.devices} × {plan.gpu.name} ({layout}); no GPU required."
    else:
        first = f"Compiled for {count} of this machine's CPU ({plan.topology}), not for GPUs"
        missing = ": JAX's CUDA plugin is missing (in a checkout: pip install -e '.[gpu]')."
        first += missing if plan.gpu else " (--gpu=h200 does)."
        first += " Temporaries and collectives are those of the CPU's compiler, only a rough guide for GPUs."
    axes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    micro_batches = f" in {plan.accumulate} micro-batches" if plan.accumulate > 1 else ""
    same = "as" if plan.parameters == plan.formula else f"not the {plan.formula:,}"
    return [
        first,
        f"{plan.rule}: {plan.parameters:,} parameters, {same} by formula, {plan.parameter_bytes:,} bytes in all; "
        f"mesh {', '.join(axes) or 'one device'}",
        f"step: {plan.rows} x {plan.length:,} tokens{micro_batches}; remat {plan.remat}",
        f"{plan.seconds['lower']:.0f} s to trace and lower, {plan.seconds['compile']:.0f} s to compile; "
        + ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
    ]


def _memory(plan: Plan) -> list[str]:
    rows = [(label, getattr(plan.memory, name)) for name, label in _MEMORY.items()]
    rows = [row for row in rows if row[1]] + [("total", plan.memory.total)]
    lines = [f"{'memory per device':<30}{'MB':>12}"]
    return lines + [f"  {label:<28}{size / 1e6:>12,.1f}" for label, size in rows]


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["no collectives"]
    lines = [f"{'collectives per step':<22}{'devices':>8}{'over':>9}{'count':>8}{'MB sent':>12}{'ms':>9}"]
    for row in plan.traffic:
        milliseconds = "" if row.seconds is None else f"{row.seconds * 1e3:.2f}"
        over = "hosts" if row.across_hosts else plan.gpu.link_name if plan.gpu else "one host"
        lines.append(
            f"  {row.kind:<20}{row.members:>8}{over:>9}{row.count:>8,}{row.sent / 1e6:>12,.1f}{milliseconds:>9}"
        )
    if plan.gpu is not None:
        assumed = "" if plan.gpu.nvlink else ", an assumption"
        lines.append(
            f"  {plan.gpu.link_name} at {plan.gpu.link / 1e9:g} GB/s and direction, between hosts "
            f"{plan.gpu.network / 1e9:g} GB/s for each GPU{assumed}"
        )
    if plan.uncounted_loops:
        lines.append(f"  {plan.uncounted_loops} loops with collectives have unknown length: each counted once")
    return lines


def _compute(plan: Plan) -> list[str]:
    per_token = plan.flops
    lines = [
        f"MFLOPs per token of training: {per_token.training / 1e6:,.1f} = 3 x (matrices {per_token.matrices / 1e6:,.1f}"
        f" + head {per_token.head / 1e6:,.1f} + mixing {per_token.mixing / 1e6:,.1f}); "
        f"executed, with remat and chunks: {per_token.executed(plan.remat) / 1e6:,.1f}"
    ]
    if plan.gpu is not None and plan.ceiling and plan.compute_seconds and plan.traffic_seconds is not None:
        least = max(plan.compute_seconds, plan.traffic_seconds)
        lines.append(
            f"minimum time per step: {plan.compute_seconds * 1e3:.1f} ms of matrix products at "
            f"{plan.gpu.flops / 1e12:.1f} TFLOP/s, {plan.traffic_seconds * 1e3:.1f} ms of collectives"
        )
        lines.append(
            f"MFU at most {plan.ceiling:.1%}, {plan.rows * plan.length / least:,.0f} tokens/s, "
            "if collectives overlap with products and nothing else takes time"
        )
    return lines


def _advice(plan: Plan) -> list[str]:
    if plan.gpu is None:
        return ["name a GPU to see whether this fits and how fast it can be: --gpu=h200"]
    total, by_default = plan.memory.total, advice.DEFAULT_MEMORY_FRACTION * plan.gpu.memory
    used = f"{total / 1e9:.1f} of {plan.gpu.memory / 1e9:.0f} GB"
    lines = []
    if total <= by_default:
        lines.append(f"It fits: {used}; JAX allocates {by_default / 1e9:.0f} GB by default.")
    elif total <= advice.MAX_MEMORY_FRACTION * plan.gpu.memory:
        fraction = f"XLA_PYTHON_CLIENT_MEM_FRACTION={advice.MAX_MEMORY_FRACTION}"
        lines.append(f"Fits only with {fraction}: {used}; JAX allocates {by_default / 1e9:.0f} GB by default.")
    else:
        lines.append(f"It does not fit: {used}.")
    if not plan.suggestions:
        least = plan.smallest
        smallest = "" if least is None else f" (the least, {least.flags}: {least.memory / 1e9:.1f} GB)"
        lines.append(
            f"No remat and micro-batch fits by estimate{smallest}: use more devices for mesh.fsdp or mesh.context."
        )
        return lines
    lines.append("Options that fit by estimate, fastest first; plan again with one to be sure:")
    for option in plan.suggestions:
        lines.append(
            f"  {option.flags:<52}{option.memory / 1e9:>8.1f} GB, at least {option.seconds * 1e3:.1f} ms per step"
        )
    return lines
