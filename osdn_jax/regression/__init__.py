"""The online regression bench: rules of memory judged without training, on streams of keys and values.

The command line is `python -m osdn_jax.regression`. Names are imported when they are first used, so that it handles
Ctrl-C before JAX is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osdn_jax.regression.bench import BETAS, Results, Row, Value, run_bench
    from osdn_jax.regression.builtin import RULES
    from osdn_jax.regression.conditions import FAMILIES, Condition, standard_conditions
    from osdn_jax.regression.measure import Scores, measure_rule
    from osdn_jax.regression.rules import Rule
    from osdn_jax.regression.sequences import Sequences, draw
    from osdn_jax.regression.table import markdown, record

__all__ = [
    "BETAS",
    "FAMILIES",
    "RULES",
    "Condition",
    "Results",
    "Row",
    "Rule",
    "Scores",
    "Sequences",
    "Value",
    "draw",
    "markdown",
    "measure_rule",
    "record",
    "run_bench",
    "standard_conditions",
]
_MODULES = ("conditions", "sequences", "rules", "builtin", "measure", "bench", "table")


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name in __all__:
        for module in _MODULES:
            members = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in members:
                return members[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, those not yet imported included."""
    return sorted({*globals(), *__all__})
