"""Planning a training run without its devices: memory, collectives, FLOPs, and which options fit."""

from osdn_jax._optional import needs_extra

with needs_extra("train", "osdn_jax.planning"):
    from osdn_jax.planning.formatting import as_json, report
    from osdn_jax.planning.planner import Plan, plan

__all__ = ["Plan", "as_json", "plan", "report"]
