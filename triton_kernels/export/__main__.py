"""Write the kernels as programs that run with JAX alone, for a GPU whose machine has no Triton that jax-triton takes.

jax-triton needs Triton 3.7 or later. The programs are of calls with given shapes and types, forward and gradient. Copy
the folder to the machine, and set TRITON_KERNELS_PROGRAMS to it: implementation="triton" then runs them. The machine
needs JAX for CUDA, of the version that is installed here, and flatbuffers.

Example:
    python -m triton_kernels.export --gpu a100 --out programs --batch 8 --length 4096 --heads 16 --decay scalar

Exit status:
    0  all programs are written
    1  a call is refused
    2  the command line is wrong, or Triton is not installed
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.programs import program
from triton_kernels import exported
from triton_kernels.aot.gpus import GPUS
from triton_kernels.common import installation
from triton_kernels.common.target import Target

_PROGRAM = "python -m triton_kernels.export"
_OPTIONS = {  # flags, by the operators that they belong to
    "documents": ("delta_rule", "hypergradient", "gram"),
    "grouped": ("delta_rule",),
    "write-key": ("delta_rule",),
    "no-erase": ("delta_rule",),
    "forget": ("hypergradient",),
    "bounds": ("hypergradient",),
    "multiply": ("hypergradient", "gram"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: arguments; default those of this process.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    if reason := installation.missing(interpret=False):
        parser.error(reason)
    if (given.out / exported.INDEX).exists():
        parser.error(f"--out: got {given.out}, which has programs; expected another folder")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # a driver is not needed
    calls = _read(given.calls, parser) if given.calls else _calls(given)
    from triton_kernels.export.programs import write

    done: list[exported.Call] = []

    def progress(call: exported.Call) -> None:
        done.append(call)
        print(f"{len(done)} of {len(calls)}: {call.text}", file=sys.stderr, flush=True)

    refused = write(given.out, calls, GPUS[given.gpu].capability, progress)
    for call, reason in refused:
        print(f"refused: {call.text}: {reason}")
    print(f"{len(done)} programs for an {given.gpu.upper()} in {given.out}. No GPU has run them.")
    return int(bool(refused))


def _calls(given: argparse.Namespace) -> list[exported.Call]:
    """Return the calls that the flags describe, forward and gradient."""
    found: list[exported.Call] = []
    for operator in given.operators:
        options = tuple(name for name, operators in _OPTIONS.items() if operator in operators and _flag(given, name))
        is_delta_rule = operator == "delta_rule"
        case = Case(
            operator,
            True,
            given.key_dim,
            (given.value_dim or given.key_dim) if is_delta_rule else None,
            given.decay if is_delta_rule else None,
            options,
            given.dtype,
            given.length,
            given.batch,
            given.heads,
        )
        function = lambda name: lambda **named: getattr(exported, name)(target=Target(0), **named)
        traced, arguments = program(case, function(operator))
        with exported.recorded() as calls:
            jax.eval_shape(traced, *arguments)
        found += calls
    return found


def _flag(given: argparse.Namespace, name: str) -> bool:
    return bool(getattr(given, name.replace("-", "_")))


def _read(file: Path, parser: argparse.ArgumentParser) -> list[exported.Call]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [exported.Call.of_data(entry) for entry in entries]
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"--calls: cannot read {file}: {error}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a wrong command line in one line, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    description, *epilog = (__doc__ or "").split("\n", 1)
    parser = _Parser(
        prog=_PROGRAM,
        description=description,
        epilog="".join(epilog).strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpu", choices=sorted(GPUS), required=True, help="GPU to write for")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the programs, made if it is absent")
    operators = list(exported.ARRAYS)
    add("--operators", nargs="+", choices=operators, default=operators, help="operators to write (default all)")
    add("--batch", type=_positive, default=8, metavar="B", help="sequences (default 8)")
    add("--length", type=_positive, default=2048, metavar="T", help="tokens of a sequence (default 2048)")
    add("--heads", type=_positive, default=16, metavar="H", help="heads (default 16)")
    add("--key-dim", type=int, choices=(32, 64, 128, 256), default=128, help="K (default 128)")
    add("--value-dim", type=int, choices=(32, 64, 128, 256), help="V (default K)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the inputs (bfloat16)")
    add("--decay", choices=("none", "scalar", "channel"), default="scalar", help="of the delta rule (default scalar)")
    about = {
        "documents": "packed documents: the state is reset",
        "grouped": "half as many key heads as value heads",
        "write-key": "an asymmetric write key",
        "no-erase": "no erasing",
        "forget": "the hypergradient forgets",
        "bounds": "the hypergradient is kept in bounds of 0 and 2",
        "multiply": "preconditioners return write keys instead of multipliers",
    }
    for name, text in about.items():
        add(f"--{name}", action="store_true", help=text)
    also = "calls to write instead: a list in JSON, of entries such as index.json has"
    add("--calls", type=Path, metavar="FILE", help=also)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
