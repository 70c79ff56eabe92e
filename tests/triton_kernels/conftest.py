"""The tests of the Triton kernels: `make test-triton` runs them, in two processes.

Tests run kernels in Triton's interpreter, under a watch for races and accesses out of bounds, in a process that is
started with TRITON_INTERPRET=1. Those marked `compiles` lower or compile kernels, in a process without it. No GPU is
needed. Where Triton is not installed, all are skipped.
"""

import importlib.util
import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
MISSING = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]


class _Skipped(pytest.Module):
    """A file of tests that cannot be imported, because its kernels need Triton."""

    def collect(self):
        pytest.skip(f"needs {' and '.join(MISSING)}: make test-triton", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if MISSING:
        return _Skipped.from_parent(parent, path=module_path)
    return None


@pytest.fixture(autouse=True)
def _mode(request):
    """Skip a test in the wrong kind of process, and watch what the kernels touch in the interpreter."""
    compiles = request.node.get_closest_marker("compiles") is not None
    if compiles and INTERPRETS:
        pytest.skip("needs a process without TRITON_INTERPRET=1: make test-triton")
    if compiles:
        yield
        return
    if not INTERPRETS:
        pytest.skip("needs a process started with TRITON_INTERPRET=1: make test-triton")
    from triton_kernels.common import interpreter_watch

    with interpreter_watch.watch():
        yield
