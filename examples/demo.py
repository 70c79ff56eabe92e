"""Train an Online Scaled DeltaNet and a DeltaNet of the same size on Shakespeare's works, and compare them.

Both see the same batches in the same order. The demo ends with a table, a plot of both curves and a text sample. If it
is interrupted, it leaves a checkpoint, and the same command resumes from it. `make demo` runs it.
"""

import argparse
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from absl import logging
from ml_collections import ConfigDict
from rich.table import Table

from osdn_jax.console import PipedConsole
from osdn_jax.evaluation import compressed_bits_per_byte
from osdn_jax.generate import generate
from osdn_jax.training import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    DataError,
    DivergedError,
    build_corpus,
    plot_loss,
    read_metrics,
    train,
)
from osdn_jax.training.command_line import fail
from osdn_jax.training.interruption import end_at_second_interrupt

_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.py"
_WORKDIR = "runs/demo"
_RULES = {"osdn": "OSDN", "delta_net": "DeltaNet"}
_SAMPLE = 300  # characters of the text sample


def main(argv: Sequence[str] = ()) -> None:
    """Train both models, print the table, draw the plot and sample text, as the flags say."""
    given = _parse(argv)
    logging.set_verbosity(logging.WARNING)  # JAX logs each type of accelerator that it does not find
    started = time.perf_counter()
    if not _CONFIG.is_file():
        raise ConfigError(f"{_CONFIG} is not there: the demo runs in a checkout of the repository")
    console = PipedConsole()
    table = Table(title="Held-out plays of Shakespeare, bits per byte (lower is better)")
    table.add_column("model")
    for column in ("parameters", "bits per byte", "tokens/s in training"):
        table.add_column(column, justify="right")
    curves = {}
    for rule, name in _RULES.items():
        config = _config(rule, given)
        result = train(config, given.workdir / rule)
        if result.step < config.steps:
            print(f"stopped after step {result.step:,} of {name}; the same command goes on from there")
            return
        rows = read_metrics(given.workdir / rule)
        speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        loss = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.3f}"
        table.add_row(name, f"{result.parameters:,}", loss, f"{speeds[-1]:,.0f}" if speeds else "")
        curves[name] = rows
    _, held_out = build_corpus(_config("osdn", given))
    compressors = compressed_bits_per_byte(b"".join(document.text for document in held_out))
    for name, bits in compressors.items():
        table.add_row(name, "", f"{bits:.3f}", "")
    console.print(table)

    picture = given.workdir / "loss.png"
    plot_loss(curves, picture, lines=compressors, title="OSDN and DeltaNet learn Shakespeare, byte by byte")
    console.print(f"Both curves: {picture}\n\n{_SAMPLE} characters from the OSDN model:\n", highlight=False)
    text = ""
    for generated in generate(given.workdir / "osdn", tokens=4 * _SAMPLE):
        generated = generated[: _SAMPLE - len(text)]
        text += generated
        sys.stdout.write(generated)
        sys.stdout.flush()
        if len(text) == _SAMPLE:
            break
    seconds = time.perf_counter() - started
    more = f"python -m osdn_jax.generate --workdir {given.workdir}/osdn"
    print(f"\n\n{seconds // 60:.0f} min {seconds % 60:.0f} s in all. More text: {more}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command.Parser(prog="python examples/demo.py", description=(__doc__ or "").strip(), allow_abbrev=False)
    parser.add_argument("--workdir", default=_WORKDIR, help=f"directory of both runs and the plot (default {_WORKDIR})")
    parser.add_argument("--steps", type=int, help="training steps of each model (default: as in configs/demo.py)")
    parser.add_argument("--seed", type=int, help="random seed of parameters and data (default: as in configs/demo.py)")
    given = parser.parse_args(argv)
    try:
        given.workdir = command.directory("workdir", given.workdir)
    except ValueError as error:
        parser.error(str(error))
    if given.steps is not None and given.steps < 1:
        parser.error(f"--steps: got {given.steps}, expected at least 1")
    if given.seed is not None and not 0 <= given.seed < 2**32:
        parser.error(f"--seed: got {given.seed}, expected an integer from 0 to 2**32 - 1")
    return given


def _config(rule: str, given: argparse.Namespace) -> ConfigDict:
    config = runpy.run_path(str(_CONFIG))["get_config"](f"rule={rule}")
    if given.steps is not None:
        config.steps = given.steps
        config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, given.steps // 10)
    if given.seed is not None:
        config.seed = given.seed
    return config


def _run() -> None:
    end_at_second_interrupt()
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, DivergedError, CheckpointError, CheckpointMismatchError) as error:
        fail(error)


if __name__ == "__main__":
    command.run(_run)
