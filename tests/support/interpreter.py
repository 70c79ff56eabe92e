"""What Mosaic GPU's interpreter says of a kernel's races, without importing anything private.

JAX 0.12 raises at a race unless told otherwise; JAX 0.11 prints it and goes on. Both call it RACE DETECTED.
"""

import contextlib
import io
import sys

import jax


@contextlib.contextmanager
def assert_no_races():
    """Fails if a kernel that is interpreted inside, with detect_races=True, has a race."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
            jax.effects_barrier()  # the interpreter is callbacks: they are over now
    finally:
        sys.stdout.write(printed.getvalue())
    assert "RACE DETECTED" not in printed.getvalue()
