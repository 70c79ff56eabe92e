"""osdn-jax: preconditioned delta-rule sequence models in JAX.

`osdn_jax.ops` has the rules as functions of arrays, `osdn_jax.nn` the Flax modules. Both are imported on first use.
"""

import importlib
from types import ModuleType

__version__ = "0.2.0"

__all__ = ["__version__", "nn", "ops"]


def __getattr__(name: str) -> ModuleType:
    """Import a subpackage on first use (PEP 562), so that importing osdn_jax alone costs nothing."""
    if name in ("nn", "ops"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy subpackages, too."""
    return sorted({*globals(), *__all__})
