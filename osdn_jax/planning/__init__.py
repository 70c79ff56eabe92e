"""What a training run needs of its devices, before they are there: memory, collectives, FLOPs, what fits."""

from osdn_jax.planning.plan import Plan, plan
from osdn_jax.planning.report import as_json, report

__all__ = ["Plan", "as_json", "plan", "report"]
