"""Implementations of the delta rule compared under jit: errors against the float64 scan, time and memory.

The command line is `python -m osdn_jax.compare`. Names are imported when they are first used, so that it handles Ctrl-C
before JAX is imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osdn_jax.compare.__main__ import main
    from osdn_jax.compare.float64_scan import reference
    from osdn_jax.compare.inputs import (
        COMPARED_RULES,
        ComparedRule,
        Shape,
        draw_cotangents,
        draw_inputs,
        parse_shapes,
        program,
        value_and_gradient,
    )
    from osdn_jax.compare.machine import environment
    from osdn_jax.compare.measure import (
        Contender,
        Result,
        compare_implementations,
        contender,
        implementations,
    )
    from osdn_jax.compare.timing import ratio, take_turns
    from osdn_jax.compare.tolerances import CANCELLING_FACTOR, TOLERANCES, tolerance

__all__ = [
    "CANCELLING_FACTOR",
    "COMPARED_RULES",
    "TOLERANCES",
    "ComparedRule",
    "Contender",
    "Result",
    "Shape",
    "compare_implementations",
    "contender",
    "draw_cotangents",
    "draw_inputs",
    "environment",
    "implementations",
    "main",
    "parse_shapes",
    "program",
    "ratio",
    "reference",
    "take_turns",
    "tolerance",
    "value_and_gradient",
]
_MODULES = ("tolerances", "machine", "timing", "inputs", "float64_scan", "measure", "__main__")


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
