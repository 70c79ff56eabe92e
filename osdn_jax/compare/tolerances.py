"""Largest errors allowed of an implementation, relative to the float64 scan."""

# Relative to the norm of the reference: outputs, final states, gradients.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}

# Gradients that are small differences of large numbers with any implementation, for the inputs of this package.
# All tokens share center and initial: their gradients are sums over the tokens with both signs (bfloat16: terms with
# an error of 0.004, sums with 0.06). That of log_forget is proportional to d - anchor, small relative to d (float32:
# 8e-5).
CANCELLING = ("d_center", "d_initial", "d_log_forget")
CANCELLING_FACTOR = 10.0


def tolerance(dtype: str, name: str) -> float:
    """Return the tolerance of an output or gradient.

    Args:
        dtype: float64, float32 or bfloat16.
        name: the output, or d_ and the argument of the gradient.

    Returns:
        The largest allowed ‖out − ref‖ / ‖ref‖.

    Example:
        >>> tolerance("bfloat16", "o"), tolerance("bfloat16", "d_center")
        (0.01, 0.1)
    """
    return TOLERANCES[dtype] * (CANCELLING_FACTOR if name in CANCELLING else 1.0)
