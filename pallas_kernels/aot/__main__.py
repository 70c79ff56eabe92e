"""Compile the kernels for an NVIDIA GPU on a machine without one; report registers, spills and shared memory.

Example:
    python -m pallas_kernels.aot --gpu h100 --cases "gradient/*/K256*"

Exit status:
    0  every kernel compiles within its recorded spill budget
    1  a kernel does not compile, spills more than its budget, exceeds CUDA's launch limits or refuses a case
    2  the command line is wrong, or JAX cannot compile for NVIDIA GPUs
"""

import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pallas_kernels.aot import compiler, record, report
from pallas_kernels.aot.cases import Case, matching
from pallas_kernels.aot.command_line import parser_of
from pallas_kernels.aot.workers import compile_cases

_PROGRAM = "python -m pallas_kernels.aot"
_WIDTH = 160  # columns of the table if the output is not a terminal
_NO_PLUGIN = """JAX's CUDA plugin, which holds the compiler for NVIDIA GPUs, is not installed. It needs no GPU:

    pip install "jax[cuda13]"        about 4.5 GB

or run `make aot` in a checkout of the repository, which creates a separate environment with it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: arguments; default those of this process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of(_PROGRAM, __doc__ or "", compiler.targets(), "h200", "spills")
    given = parser.parse_args(argv)
    cases = matching(given.cases)
    if not cases:
        parser.error(f"--cases: no case matches {given.cases!r}; --list shows them")
    if given.record and given.cases:
        parser.error(f"--record: got --cases {given.cases!r}, expected a run of all cases")
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
    report.show(console, outcomes, known, f"Assembler report of the kernels, {given.gpu.upper()}")
    text = report.summary(outcomes, known, versions)
    text += f" {time.perf_counter() - start:.0f} s."
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if given.json:
        given.json.write_text(json.dumps(report.as_data(outcomes, about), indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(report.as_markdown(outcomes, known, about), encoding="utf-8")
    return int(any(known.problems(outcome) for outcome in outcomes))


def _compile(cases: Sequence[Case], gpu: str, jobs: int) -> list[compiler.Outcome]:
    """Return the outcomes of the cases, showing progress on stderr."""
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


if __name__ == "__main__":
    sys.exit(main())
