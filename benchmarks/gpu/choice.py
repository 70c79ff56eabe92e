"""The implementation that a call of the suite checks and times, and what this machine lacks for it."""

import importlib.metadata
import importlib.util
import re

from benchmarks.gpu.cases import is_triton
from osdn_jax.ops import selection
from triton_kernels.common import installation, target

TRITON = "triton"
_INTERPRETED = ("mosaic_gpu", TRITON)
# What jax-triton 0.4.1 asks for. The Triton that a PyTorch brings, and flash-linear-attention uses, may be older.
_OLDEST_TRITON = (3, 7)


def implementation(named: str | None, dry: bool) -> str:
    """Return the implementation to check: the one that is named, or the kernels that serve this GPU.

    Args:
        named: the name, or None.
        dry: True for a run without a GPU: kernels then run in their interpreter.
    """
    chosen = named or ("mosaic_gpu" if dry or selection.on_hopper() else TRITON)
    return f"{chosen}_interpret" if dry and chosen in _INTERPRETED else chosen


def absent(name: str, exported: bool = False) -> str | None:
    """Return why this machine cannot run any call of an implementation; None if it can, or if only a call can tell.

    Args:
        name: of the implementation.
        exported: True if programs of another machine stand in for the Triton kernels.
    """
    if not is_triton(name):
        return None
    if name == "triton_interpret":  # the suite sets the variable that the interpreter needs for its processes
        return None if importlib.util.find_spec("triton") else installation.missing(interpret=True)
    return target.limitation() or (_unreadable() if exported else installation.missing(interpret=False) or _too_old())


def _too_old() -> str | None:
    version = importlib.metadata.version("triton")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers >= _OLDEST_TRITON:
        return None
    exports = "--programs runs what python -m triton_kernels.export has compiled on another machine"
    return f"got Triton {version}, jax-triton needs 3.7 or later; {exports}"


def _unreadable() -> str | None:
    if importlib.util.find_spec("flatbuffers") is None:
        return "exported programs need flatbuffers to be read: pip install flatbuffers"
    return None
