"""Diagnostics of a trained run as tables and figures: `python -m osdn_jax.diagnose`.

`diagnose_run` computes them, `save` writes the files. docs/diagnostics.md says what each number means.
"""

from osdn_jax.diagnose.run import RunDiagnostics, diagnose_run
from osdn_jax.diagnose.saving import save

__all__ = ["RunDiagnostics", "diagnose_run", "save"]
