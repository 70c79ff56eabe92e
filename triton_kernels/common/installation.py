"""Requirements of the kernels beyond JAX, and how to get them."""

import importlib.util
import os

VARIABLE = "TRITON_INTERPRET"


def missing(*, interpret: bool) -> str | None:
    """Return what this process lacks to launch the kernels and how to get it, None if it lacks nothing.

    Args:
        interpret: for Triton's interpreter, which needs no jax-triton, but a variable set before Triton is imported.
    """
    needed = ("triton",) if interpret else ("triton", "jax_triton")
    absent = [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        names = " and ".join(absent)
        return f"needs {names}: pip install 'osdn-jax[triton]', in a checkout pip install -e '.[triton]'"
    if interpret and os.environ.get(VARIABLE) != "1":
        return f"needs a process started with {VARIABLE}=1 in its environment"
    if not interpret and os.environ.get(VARIABLE) == "1":
        return f"cannot compile in a process started with {VARIABLE}=1: unset it, or name triton_interpret"
    return None
