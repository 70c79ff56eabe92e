"""Race detection by Mosaic GPU's interpreter, without private imports.

JAX 0.12 raises at a race by default; JAX 0.11 prints it and continues. Both report RACE DETECTED.
"""

import contextlib
import io
import sys

import jax


@contextlib.contextmanager
def assert_no_races():
    """Fail if a kernel that is interpreted inside the block, with detect_races=True, has a race."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
            jax.effects_barrier()  # wait for the callbacks that the interpreter runs in
    finally:
        sys.stdout.write(printed.getvalue())
    assert "RACE DETECTED" not in printed.getvalue()
