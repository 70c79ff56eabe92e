"""How far from the float64 scan an implementation may be."""

# Relative to the norm of the reference: outputs, final states, gradients.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}

# Gradients that are small differences of large numbers, whatever computes them, for the inputs of this package.
# All tokens share center and initial: their gradients are sums over the tokens with both signs (bfloat16: terms of
# error 0.004, sums of error 0.06). That of log_forget is proportional to d - anchor, small beside d (float32: 8e-5).
CANCELLING = ("d_center", "d_initial", "d_log_forget")
CANCELLING_FACTOR = 10.0


def tolerance(dtype: str, name: str) -> float:
    """The tolerance of an output, or of the gradient d_ARGUMENT, in a type."""
    return TOLERANCES[dtype] * (CANCELLING_FACTOR if name in CANCELLING else 1.0)
