"""Implementations beside each other under jit: inputs for every rule, errors, times, memory. For `osdn_jax.compare`."""

from osdn_jax.comparison.environment import environment
from osdn_jax.comparison.inputs import (
    RULES,
    Rule,
    Shape,
    draw_cotangents,
    draw_inputs,
    parse_shapes,
    program,
    value_and_gradient,
)
from osdn_jax.comparison.measure import Contender, Result, compare, contender, implementations, ratio, take_turns
from osdn_jax.comparison.reference import reference
from osdn_jax.comparison.tolerances import CANCELLING_FACTOR, TOLERANCES, tolerance

__all__ = [
    "CANCELLING_FACTOR",
    "RULES",
    "TOLERANCES",
    "Contender",
    "Result",
    "Rule",
    "Shape",
    "compare",
    "contender",
    "draw_cotangents",
    "draw_inputs",
    "environment",
    "implementations",
    "parse_shapes",
    "program",
    "ratio",
    "reference",
    "take_turns",
    "tolerance",
    "value_and_gradient",
]
