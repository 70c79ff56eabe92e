"""How far from the float64 scan an implementation may be."""

# Relative to the norm of the reference, for outputs and final states.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}
GRADIENT_FACTOR = 1.0


def tolerance(dtype: str, gradient: bool) -> float:
    """The tolerance of an output, or of a gradient, in a type."""
    return TOLERANCES[dtype] * (GRADIENT_FACTOR if gradient else 1.0)
