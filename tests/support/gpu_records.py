"""Rows and records of the GPU suite, as its stages leave them."""

from benchmarks.gpu import plan
from benchmarks.gpu.report import markdown
from osdn_jax.compare import parse_shapes

SHAPE = parse_shapes("B1T8192H64D128")[0]
IDENTITY = {
    "device": "NVIDIA H100 80GB HBM3",
    "dry": False,
    "source": "0123456789abcdef",
    "implementation": "mosaic_gpu",
    "jax": "0.11.2",
    "torch": "2.11",
    "fla-core": None,
}
CALL = {
    "date": "2026-01-01 00:00 UTC",
    "command": "python -m benchmarks.gpu_suite --stage ours",
    "commit": "abcdef012345",
    "driver": "580.0",
    "budget": 540.0,
    "seconds": 500.0,
}
REQUEST = plan.Request("mosaic_gpu", dry=False)


def owed(stage, known=(), request=REQUEST):
    return plan.plan_stage(stage, known, request).owed


def everything(known=()):
    return [key for stage in plan.STAGES for key in owed(stage, known)]


def measured(key, **more):
    row = {"status": "measured", "median_seconds": 1e-3, "quartile_seconds": (9e-4, 1.1e-3), "host_bound": False}
    return {**key, **row, "difference": None, "bytes": 10**9, "flops": 10**11, **more}


def finished(key):
    if key["section"] in ("smoke", "check"):
        return {**key, "status": "pass", "error": 1e-3, "limit": 1e-2, "worst": "d_initial_state", "same": True}
    if key["section"] == "ceilings":
        return {**key, "status": "measured", "bytes_per_second": 4e12, "flops_per_second": 8e14}
    if key["section"] == "compile":
        return {**key, "status": "compiled", "seconds": 10.0}
    return measured(key)


def text(rows, *sections, **identity):
    content = {"identity": IDENTITY | identity, "calls": [CALL], "rows": rows}
    return "\n".join(markdown(content, sections) if sections else markdown(content))
