"""Optional libraries: imported on first use, and named with their extra if they are missing."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
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
        raise ImportError(_message(purpose, library, extra)) from error


@contextlib.contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn a library that an import inside does not find into an ImportError that says how to install it.

    Args:
        extra: the extra of osdn-jax that installs the libraries.
        purpose: what needs them, as the subject of the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library in ("", "osdn_jax", "pallas_kernels"):  # a fault of the package itself
            raise
        raise ImportError(_message(purpose, library, extra)) from error


def check_installed(library: str) -> None:
    """Raise ModuleNotFoundError if a library is not installed, without importing it."""
    if importlib.util.find_spec(library) is None:
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)


def _message(purpose: str, library: str, extra: str) -> str:
    return (
        f"{purpose} needs the library {library}: pip install 'osdn-jax[{extra}]', "
        f"in a checkout pip install -e '.[{extra}]'"
    )
