"""The files of `python -m osdn_jax.diagnose`."""

import json
import os
from pathlib import Path

from osdn_jax._files import write_atomically
from osdn_jax.diagnose import figures
from osdn_jax.diagnose.report import markdown, record
from osdn_jax.diagnose.run import RunDiagnostics

TABLE, RECORD = "diagnostics.md", "diagnostics.json"


def save(diagnostics: RunDiagnostics, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the tables, all numbers and the figures of a run's diagnostics; files of these names are replaced.

    Args:
        diagnostics: of `diagnose_run`.
        folder: created if it does not exist.

    Returns:
        The files: diagnostics.md, diagnostics.json, and the figures in `figures.FIGURES`.

    Raises:
        OSError: a file cannot be written; the error names it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found, about = diagnostics
    contents: dict[str, str | bytes] = {
        TABLE: markdown(found, about),
        RECORD: json.dumps(record(found, about), allow_nan=False) + "\n",
    }
    contents |= {f"{name}.png": draw(found, about) for name, draw in figures.FIGURES.items()}
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]
