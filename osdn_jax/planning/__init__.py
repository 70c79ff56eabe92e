"""What a training run needs of its devices, before they are there: memory, collectives, FLOPs, what fits."""

from osdn_jax.planning.formatting import as_json, report
from osdn_jax.planning.planner import Plan, plan

__all__ = ["Plan", "as_json", "plan", "report"]
