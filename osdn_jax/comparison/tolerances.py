"""How far from the float64 scan an implementation may be."""

# Relative to the norm of the reference: outputs, final states, gradients.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}

# The gradient of an array that all tokens share is a sum over them with both signs, and small beside its terms: against
# random cotangents, bfloat16 terms of error 0.004 made sums of error 0.06 (T = 1000, two numbers).
SHARED = ("d_center", "d_initial")
SHARED_FACTOR = 10.0


def tolerance(dtype: str, name: str) -> float:
    """The tolerance of an output, or of the gradient d_ARGUMENT, in a type."""
    return TOLERANCES[dtype] * (SHARED_FACTOR if name in SHARED else 1.0)
