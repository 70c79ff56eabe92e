"""Optional libraries, imported when they are first needed."""

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """The module, imported now. Raises ImportError that says what it is for and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(f"{purpose} needs the library {library}: pip install 'osdn-jax[{extra}]'") from error
