"""What `make demo` runs: an Online Scaled DeltaNet beside a DeltaNet of the same size, on Shakespeare's works.

Both see the same batches in the same order. Ends with a table, a picture of both curves and a sample.
"""

import runpy
import sys
import time
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from osdn_jax.data import compressed_bits_per_byte
from osdn_jax.generate import generate
from osdn_jax.training import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    DivergedError,
    build_corpus,
    plot_loss,
    read_metrics,
    train,
)
from osdn_jax.training.config import fail

_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.py"
_WORKDIR = Path("runs") / "demo"
_RULES = {"osdn": "OSDN", "delta_net": "DeltaNet"}
_SAMPLE = 300  # characters


def main() -> None:
    """Trains, compares and samples."""
    logging.set_verbosity(logging.WARNING)  # JAX reports the accelerators that it looked for and did not find
    started = time.perf_counter()
    if not _CONFIG.is_file():
        raise ConfigError(f"{_CONFIG} is not there: the demo runs in a checkout of the repository")
    console = Console()
    table = Table(title="Held-out plays of Shakespeare, bits per byte (lower is better)")
    table.add_column("model")
    for column in ("parameters", "bits per byte", "tokens/s in training"):
        table.add_column(column, justify="right")
    curves = {}
    for rule, name in _RULES.items():
        result = train(_config(rule), _WORKDIR / rule)
        rows = read_metrics(_WORKDIR / rule)
        speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        table.add_row(name, f"{result.parameters:,}", f"{result.bits_per_byte:.3f}", f"{speeds[-1]:,.0f}")
        curves[name] = rows
    _, held_out = build_corpus(_config("osdn"))
    compressors = compressed_bits_per_byte(b"".join(document.text for document in held_out))
    for name, bits in compressors.items():
        table.add_row(name, "", f"{bits:.3f}", "")
    console.print(table)

    picture = _WORKDIR / "loss.png"
    plot_loss(curves, picture, lines=compressors, title="OSDN and DeltaNet learn Shakespeare, byte by byte")
    console.print(f"Both curves: {picture}\n\n{_SAMPLE} characters from the OSDN model:\n", highlight=False)
    text = ""
    for piece in generate(_WORKDIR / "osdn", tokens=4 * _SAMPLE):
        piece = piece[: _SAMPLE - len(text)]
        text += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
        if len(text) == _SAMPLE:
            break
    seconds = time.perf_counter() - started
    more = f"python -m osdn_jax.generate --workdir {_WORKDIR}/osdn"
    print(f"\n\n{seconds // 60:.0f} min {seconds % 60:.0f} s in all. More text: {more}")


def _config(rule: str) -> ConfigDict:
    return runpy.run_path(str(_CONFIG))["get_config"](f"rule={rule}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DivergedError, CheckpointError, CheckpointMismatchError) as error:
        fail(error)
