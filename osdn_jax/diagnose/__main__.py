"""Look into the delta rules of a trained model:  python -m osdn_jax.diagnose --workdir runs/osdn

For each layer, on held-out data: the loss of every token before and after its write, the residual ratio, the factors
that the preconditioner multiplies keys by, the keys' Gram matrix, and the regret against the best fixed factors. The
same numbers of the recurrence without the preconditioner stand next to them. Writes tables, all numbers and figures.
"""

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from pathlib import Path

from osdn_jax.diagnose import diagnose_run, save
from osdn_jax.diagnose.report import table
from osdn_jax.diagnose.run import WINDOWS
from osdn_jax.evaluation.hindsight import STEPS
from osdn_jax.progress import say
from osdn_jax.training import CheckpointError, CheckpointMismatchError
from osdn_jax.training.command_line import fail

_PROGRAM = "python -m osdn_jax.diagnose"
_FOLDER = "diagnostics"


def main() -> None:
    """Run the command line."""
    parser = command.Parser(prog=_PROGRAM, description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--workdir", required=True, help="working directory of a run of train.py")
    add("--windows", type=int, default=WINDOWS, help=f"held-out windows, evenly spaced (default {WINDOWS})")
    add("--length", type=int, help="tokens in a window (default: validation.sequence_length of the run)")
    add("--bins", type=int, default=64, help="bins of positions (default 64)")
    add(
        "--hindsight_steps",
        type=int,
        default=STEPS,
        help=f"gradient steps of each search for the best fixed d; 0 leaves it out (default {STEPS})",
    )
    add("--output", help=f"folder of the files (default: {_FOLDER} in the working directory)")
    given = parser.parse_args()
    try:
        workdir = command.directory("workdir", given.workdir)
        folder = workdir / _FOLDER if given.output is None else command.directory("output", given.output)
        diagnostics = diagnose_run(
            workdir,
            windows=given.windows,
            length=given.length,
            bins=given.bins,
            hindsight_steps=given.hindsight_steps,
            on_layer=lambda done, layers: say(f"layer {done} of {layers}"),
        )
        files = save(diagnostics, folder)
    except (ValueError, TypeError, OSError, ImportError, CheckpointError, CheckpointMismatchError) as error:
        fail(error)
    say("\n".join(["", *table(diagnostics.found.layers), "", f"Files: {_listed(files)}"]))


def _listed(files: list[Path]) -> str:
    return f"{files[0]}, {', '.join(file.name for file in files[1:])}"


if __name__ == "__main__":
    command.run(main)
