"""Look into a folder with a model of another library:  python -m osdn_jax.interop inspect PATH

Says what the folder is and what would be loaded, from its headers alone, and every reason why it cannot be loaded.
"""

import sys

from osdn_jax import command

if __name__ == "__main__":
    command.start()

from osdn_jax.interop.folder import IGNORE_REMOTE_CODE
from osdn_jax.interop.inspection import inspect

_PROGRAM = "python -m osdn_jax.interop"


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name. Default: those of the process.

    Returns:
        The exit status: 0 if the folder can be loaded, else 2.
    """
    description = (__doc__ or "").splitlines()[0]
    parser = command.Parser(prog=_PROGRAM, description=description, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect")
    looking = commands.add_parser("inspect", help="say what a folder is and what would be loaded", allow_abbrev=False)
    looking.add_argument("path", metavar="PATH", help="folder with config.json and safetensors files")
    looking.add_argument("--ignore_remote_code", action="store_true", help=IGNORE_REMOTE_CODE)
    given = parser.parse_args(argv)
    try:
        found = inspect(given.path, ignore_remote_code=given.ignore_remote_code)
    except (ValueError, TypeError, OSError) as error:
        _say(error)
        return command.USAGE_ERROR
    print("\n".join(found.lines), flush=True)
    for problem in found.problems:
        _say(problem)
    return command.USAGE_ERROR if found.problems else 0


def _say(problem: object) -> None:
    message = command.naming_flags(str(problem), {"path": "PATH", "ignore_remote_code": "--ignore_remote_code"})
    print(f"{_PROGRAM} inspect: error: {message}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
