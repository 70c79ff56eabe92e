"""The implementation that a call of the suite checks and times, and what this machine lacks for it."""

import importlib.metadata
import importlib.util
import re

from benchmarks.gpu.cases import is_triton
from osdn_jax.ops import selection
from triton_kernels import exported
from triton_kernels.common import installation, target

_INTERPRETED = ("mosaic_gpu", "triton")
# What jax-triton 0.4.1 asks for. The Triton that a PyTorch brings, and flash-linear-attention uses, may be older.
_OLDEST_TRITON = (3, 7)


def implementation(named: str | None, dry: bool) -> str:
    """Return the implementation to check: the one that is named, or the kernels that serve this GPU.

    Args:
        named: the name, or None.
        dry: True for a run without a GPU: kernels then run in their interpreter.
    """
    chosen = named or ("mosaic_gpu" if dry or selection.on_hopper() else "triton")
    return f"{chosen}_interpret" if dry and chosen in _INTERPRETED else chosen


def absent(name: str) -> str | None:
    """Return why this machine cannot run any call of an implementation; None if it can, or if only a call can tell."""
    if not is_triton(name):
        return None
    if name == "triton_interpret":  # the suite sets the variable that the interpreter needs for its processes
        return None if importlib.util.find_spec("triton") else installation.missing(interpret=True)
    if exported.in_use():  # programs of another machine, which need no Triton here
        return target.limitation()
    return target.limitation() or installation.missing(interpret=False) or _too_old()


def _too_old() -> str | None:
    version = importlib.metadata.version("triton")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers >= _OLDEST_TRITON:
        return None
    return f"got Triton {version}, jax-triton needs 3.7 or later"
