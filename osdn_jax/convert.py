"""Convert a model to another layout:  python -m osdn_jax.convert SOURCE DESTINATION --layout gated_deltanet

SOURCE is a folder with config.json and safetensors files, or the working directory of a run of train.py, of which the
newest checkpoint is read. A run that started from a folder (config.init) is written in the layout of that folder if its
rule was not changed. DESTINATION is a new folder, which `osdn_jax.interop.load_pretrained` reads; in the layout of
another library, that library reads it too.
"""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from osdn_jax import interop
from osdn_jax._files import replacing
from osdn_jax.interop.folder import IGNORE_REMOTE_CODE
from osdn_jax.interop.loading import open_folder, origin_of
from osdn_jax.nn import CausalLM
from osdn_jax.progress import say
from osdn_jax.training import CheckpointError, CheckpointMismatchError
from osdn_jax.training.command_line import fail
from osdn_jax.training.trained import load_trained
from osdn_jax.training.workdir import CHECKPOINT_FOLDER

_PROGRAM = "python -m osdn_jax.convert"
_FLAGS = {name: f"--{name}" for name in ("layout", "dtype", "overwrite", "ignore_remote_code")}
_DTYPES = ("float32", "bfloat16")


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: the arguments without the program's name. Default: those of the process.
    """
    description = (__doc__ or "").splitlines()[0]
    parser = command.Parser(prog=_PROGRAM, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="folder of a model, or working directory of a run of train.py")
    add("destination", metavar="DESTINATION", help="the new folder")
    add("--layout", choices=tuple(interop.FAMILIES), metavar="NAME", help=_layouts())
    add(
        "--dtype",
        choices=_DTYPES,
        metavar="TYPE",
        help=f"of all tensors: {', '.join(_DTYPES)} (default: those of SOURCE, or of the folder a run started from)",
    )
    add("--overwrite", action="store_true", help="replace the model in a folder that is not empty")
    add("--ignore_remote_code", action="store_true", help=IGNORE_REMOTE_CODE)
    given = parser.parse_args(argv)
    with _refusing(path="SOURCE"):
        source = command.local_directory(given.source)
        tokenizer = None
        if (source / CHECKPOINT_FOLDER).is_dir():
            model, tokenizer = _trained(source)
        else:
            model = interop.load_pretrained(source, ignore_remote_code=given.ignore_remote_code)
    with _refusing(path="DESTINATION"):
        destination = command.local_directory(given.destination)
        options = {"layout": given.layout, "dtype": given.dtype, "overwrite": given.overwrite}
        layout = interop.save_pretrained(model, destination, **options)
        if tokenizer is not None:
            _copy(tokenizer, destination / f"tokenizer{tokenizer.suffix}")
            settings = tokenizer.with_name("tokenizer_config.json")
            if settings.is_file():
                _copy(settings, destination / settings.name)
    print(f"{destination}: {layout}", file=sys.stdout, flush=True)


@contextlib.contextmanager
def _refusing(**names: str) -> Iterator[None]:
    """End the command with one line if what is done inside fails; the line has these names for arguments."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, CheckpointError, CheckpointMismatchError) as error:
        fail(ValueError(command.naming_flags(str(error), _FLAGS | names)))


def _copy(file: Path, target: Path) -> None:
    """Copy a file, which may be the target itself; a link in its place is replaced, not written through."""
    with replacing(target) as new:
        shutil.copyfile(file, new)


def _layouts() -> str:
    return f"layout to write: {', '.join(interop.FAMILIES)} (default: that of SOURCE, or osdn_jax)"


def _trained(workdir: Path) -> tuple[CausalLM, Path | None]:
    """Return the model of a run at its newest checkpoint, and the file of its tokenizer if it has one."""
    trained = load_trained(workdir)
    file = Path(trained.tokenizer.name)
    model = interop.assembled(trained.model, trained.parameters)
    model.origin = _start(trained.config.init)
    return model, file if file.is_file() else None


def _start(folder: str) -> interop.Origin | None:
    """Return the note of the folder that a run started from; None if it is gone or has changed since."""
    if not folder:
        return None
    try:
        opened = open_folder(folder, ignore_remote_code=True)
    except (ValueError, OSError) as error:
        say(f"note: the layout of {folder} is not used: {error}")
        return None
    if opened.plan.problems:
        say(f"note: the layout of {folder} is not used: its tensors have changed since the run started")
        return None
    return origin_of(opened)


if __name__ == "__main__":
    command.run(main)
