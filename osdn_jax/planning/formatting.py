"""A plan in words."""

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
    """Some thirty lines for a terminal."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_traffic(plan), "", *_compute(plan), "", *_advice(plan)])


def as_json(plan: Plan) -> str:
    """All figures."""
    return json.dumps(dataclasses.asdict(plan) | {"fits": plan.fits}, indent=2) + "\n"


def _head(plan: Plan) -> list[str]:
    count = f"{plan.devices} devices" if plan.devices > 1 else "1 device"
    if plan.compiled_for == "gpu" and plan.gpu is not None:
        first = f"Compiled for {count}, {plan.gpu.name} ({plan.topology}), that need not be here."
    else:
        first = f"Compiled for {count} of this machine's CPU ({plan.topology}), not for GPUs"
        first += ": JAX's CUDA plugin is missing (pip install 'osdn-jax[gpu]')." if plan.gpu else " (--gpu=h200 does)."
        first += " Temporaries and collectives are the CPU's, a hint at most of what a GPU needs."
    axes = [f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1]
    parts = f" in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    same = "as" if plan.parameters == plan.formula else f"not the {plan.formula:,}"
    return [
        first,
        f"{plan.rule}: {plan.parameters:,} parameters, {same} by formula, {plan.parameter_bytes:,} bytes in all; "
        f"mesh {', '.join(axes) or 'of one device'}",
        f"a step: {plan.rows} x {plan.length:,} tokens{parts}; remat {plan.remat}",
        f"took {plan.seconds['lower']:.0f} s to trace and lower, {plan.seconds['compile']:.0f} s to compile; "
        + ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
    ]


def _memory(plan: Plan) -> list[str]:
    rows = [(label, getattr(plan.memory, name)) for name, label in _MEMORY.items()]
    rows = [row for row in rows if row[1]] + [("total", plan.memory.total)]
    lines = [f"{'memory of each device':<30}{'MB':>12}"]
    return lines + [f"  {label:<28}{size / 1e6:>12,.1f}" for label, size in rows]


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["no collectives"]
    lines = [f"{'collectives of a step':<22}{'devices':>8}{'over':>9}{'times':>8}{'MB sent':>12}{'ms':>9}"]
    for row in plan.traffic:
        milliseconds = "" if row.seconds is None else f"{row.seconds * 1e3:.2f}"
        over = "hosts" if row.across_hosts else "NVLink" if plan.gpu else "one host"
        lines.append(
            f"  {row.kind:<20}{row.members:>8}{over:>9}{row.count:>8,}{row.sent / 1e6:>12,.1f}{milliseconds:>9}"
        )
    if plan.uncounted_loops:
        lines.append(f"  {plan.uncounted_loops} loops with collectives have no known length: each counted once")
    return lines


def _compute(plan: Plan) -> list[str]:
    each = plan.flops
    lines = [
        f"MFLOPs per token of training: {each.training / 1e6:,.1f} = 3 x (matrices {each.matrices / 1e6:,.1f}"
        f" + head {each.head / 1e6:,.1f} + mixing {each.mixing / 1e6:,.1f}); "
        f"executed, with remat and chunks: {each.executed(plan.remat) / 1e6:,.1f}"
    ]
    if plan.gpu is not None and plan.ceiling and plan.compute_seconds and plan.traffic_seconds is not None:
        least = max(plan.compute_seconds, plan.traffic_seconds)
        lines.append(
            f"a step takes at least {plan.compute_seconds * 1e3:.1f} ms of products at "
            f"{plan.gpu.flops / 1e12:.1f} TFLOP/s and {plan.traffic_seconds * 1e3:.1f} ms of collectives"
        )
        lines.append(
            f"MFU at most {plan.ceiling:.1%}, {plan.rows * plan.length / least:,.0f} tokens/s, "
            "if collectives hide behind products and all else costs nothing"
        )
    return lines


def _advice(plan: Plan) -> list[str]:
    if plan.gpu is None:
        return ["name a GPU to learn whether this fits and how fast it can be: --gpu=h200"]
    total, by_default = plan.memory.total, advice.DEFAULT_MEMORY_FRACTION * plan.gpu.memory
    used = f"{total / 1e9:.1f} of {plan.gpu.memory / 1e9:.0f} GB"
    lines = []
    if total <= by_default:
        lines.append(f"It fits: {used}; JAX takes {by_default / 1e9:.0f} GB by default.")
    elif total <= advice.MAX_MEMORY_FRACTION * plan.gpu.memory:
        fraction = f"XLA_PYTHON_CLIENT_MEM_FRACTION={advice.MAX_MEMORY_FRACTION}"
        lines.append(f"It fits with {fraction} alone: {used}; JAX takes {by_default / 1e9:.0f} GB by default.")
    else:
        lines.append(f"It does not fit: {used}.")
    if not plan.suggestions:
        least = plan.smallest
        said = "" if least is None else f" (the least, {least.flags}: {least.memory / 1e9:.1f} GB)"
        lines.append(f"No remat and micro-batch fits by estimate{said}: more devices for mesh.fsdp, or mesh.context.")
        return lines
    lines.append("What fits, by estimate, the fastest first; plan again with it to be sure:")
    for option in plan.suggestions:
        lines.append(
            f"  {option.flags:<52}{option.memory / 1e9:>8.1f} GB, a step of at least {option.seconds * 1e3:.1f} ms"
        )
    return lines
