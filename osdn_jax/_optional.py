"""Optional libraries, imported on first use."""

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import and return an optional library.

    Args:
        module: its import name, such as "pyarrow.parquet".
        extra: the extra of osdn-jax that installs it.
        purpose: what needs it, as the subject of the message.

    Raises:
        ImportError: it is not installed; the message says what needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs the library {library}: pip install 'osdn-jax[{extra}]', "
            f"in a checkout pip install -e '.[{extra}]'"
        ) from error
