"""Compiles every kernel and shape of a list for a GPU that need not be there, and fails where one spills too much.

    python -m pallas_kernels.aot --gpu h100 --cases "gradient/*/K256*"

Exit status: 0 when all is as recorded; 1 when a kernel does not compile, spills more than its budget or does not serve
a case that it should; 2 when the command line is wrong or JAX cannot compile for NVIDIA's GPUs.
"""

import argparse
import datetime
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pallas_kernels.aot import compiler, record, report
from pallas_kernels.aot.cases import Case, matching
from pallas_kernels.aot.workers import compile_cases

_PROGRAM = "python -m pallas_kernels.aot"
_WIDTH = 160  # of the table where no terminal says otherwise
_JOBS = min(4, os.cpu_count() or 1)
_NO_PLUGIN = """JAX's CUDA plugin is not installed here, which holds the compiler for NVIDIA's GPUs (no GPU is needed):

    pip install "jax[cuda13]"        about 4.5 GB

or `make aot`, in a checkout of the repository: it makes an environment for this alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    given = parser.parse_args(argv)
    cases = matching(given.cases)
    if not cases:
        parser.error(f"--cases: no case matches {given.cases!r}; --list shows them")
    if given.record and given.cases:
        parser.error("--record: takes every case, not only those of --cases")
    if given.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not compiler.has_plugin():
        print(_NO_PLUGIN, file=sys.stderr)
        return 2
    compiler.prepare_environment()
    start = time.perf_counter()
    outcomes = _compile(cases, given.gpu, given.jobs)
    versions = compiler.versions()
    if given.record:
        record.save(Path(str(record.FILE)), outcomes, versions)
    known = record.load()
    about = {
        "command": shlex.join([*_PROGRAM.split(), *argv]),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "gpu": given.gpu,
        "versions": versions,
    }
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    report.show(console, outcomes, known, f"What the assembler says of the kernels, {given.gpu.upper()}")
    text = report.summary(outcomes, known, versions)
    text += f" {time.perf_counter() - start:.0f} s."
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if given.json:
        given.json.write_text(json.dumps(report.as_data(outcomes, about), indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(report.as_markdown(outcomes, known, about), encoding="utf-8")
    return int(any(known.problems(outcome) for outcome in outcomes))


def _compile(cases: Sequence[Case], gpu: str, jobs: int) -> list[compiler.Outcome]:
    outcomes = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Compiling {len(cases)} cases", total=len(cases))
        for outcome in compile_cases(cases, gpu, jobs):
            outcomes.append(outcome)
            progress.advance(task)
            if not console.is_terminal:
                text = f"{len(outcomes)} of {len(cases)}: {outcome.name}: {outcome.status}, {outcome.seconds:.1f} s"
                print(text, file=sys.stderr, flush=True)
    return outcomes


def _parser() -> argparse.ArgumentParser:
    description, *epilog = (__doc__ or "").split("\n", 1)
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description=description,
        epilog="".join(epilog).strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpu", choices=compiler.targets(), default="h200", help="the GPU to compile for (default h200)")
    add("--cases", default="", metavar="PATTERN", help="only cases whose name contains this; * stands for anything")
    add("--list", action="store_true", help="print the names of the cases, and compile nothing")
    add("--json", type=_file, metavar="FILE", help="write the results")
    add("--markdown", type=_file, metavar="FILE", help="write the table as a page")
    add("--jobs", type=_positive, default=_JOBS, metavar="N", help=f"processes at a time (default {_JOBS})")
    add("--record", action="store_true", help="make what this run shows the budgets of later ones")
    return parser


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file in a folder that is there")
    return path


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
