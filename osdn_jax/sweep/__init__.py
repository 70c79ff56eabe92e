"""Sweeps: many small models on a recall task, over rules, learning rates and seeds.

`python -m osdn_jax.sweep` is the command line; what it does is here.
"""

from osdn_jax._optional import needs_extra

with needs_extra("train", "osdn_jax.sweep"):
    from osdn_jax.sweep.figure import plot_sweep
    from osdn_jax.sweep.plan import Plan, Run, by_key, chosen_rate
    from osdn_jax.sweep.results import Results, append_result, read_results
    from osdn_jax.sweep.summary import Row, default_threshold, plateau, summarise, transition
    from osdn_jax.sweep.table import Summary, chance_of, markdown, summarise_plan
    from osdn_jax.sweep.trainer import Curve, Trainer, check_config
    from osdn_jax.sweep.variants import Variant, make_variants

__all__ = [
    "Curve",
    "Plan",
    "Results",
    "Row",
    "Run",
    "Summary",
    "Trainer",
    "Variant",
    "append_result",
    "by_key",
    "chance_of",
    "check_config",
    "chosen_rate",
    "default_threshold",
    "make_variants",
    "markdown",
    "plateau",
    "plot_sweep",
    "read_results",
    "summarise",
    "summarise_plan",
    "transition",
]
