"""Requirements of the kernels beyond JAX, and how to get them."""

import importlib.metadata
import importlib.util
import os
import re

VARIABLE = "TRITON_INTERPRET"
OLDEST_TRITON = (3, 7)  # of jax-triton 0.4.1


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
    old = _old_triton()
    if old is not None:
        return f"needs triton {'.'.join(map(str, OLDEST_TRITON))} or later, got {old}"
    if interpret and os.environ.get(VARIABLE) != "1":
        return f"needs a process started with {VARIABLE}=1 in its environment"
    if not interpret and os.environ.get(VARIABLE) == "1":
        return f"cannot compile in a process started with {VARIABLE}=1: unset it, or name triton_interpret"
    return None


def _old_triton() -> str | None:
    """Return the version of Triton if it is too old."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build without metadata
        return None
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    return version if numbers < OLDEST_TRITON else None
