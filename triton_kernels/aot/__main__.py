"""Compile the Triton kernels for an NVIDIA GPU on a machine without one; report registers, spills and shared memory.

Example:
    python -m triton_kernels.aot --gpu rtx4090 --cases "gradient/*/K128*"

Exit status:
    0  every kernel is within its limits: no spills in loops beyond the record, at most 10 CPU seconds to compile, the
       GPU's shared memory, and for long sequences of few heads as many programs as the GPU has multiprocessors
    1  a kernel does not compile or is over a limit, or a case is refused
    2  the command line is wrong, or Triton is not installed
"""

import datetime
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from pallas_kernels.aot.command_line import parser_of
from triton_kernels.aot import compiler, record, results
from triton_kernels.aot.cases import matching
from triton_kernels.aot.gpus import GPUS
from triton_kernels.aot.report import Run

_PROGRAM = "python -m triton_kernels.aot"
_WIDTH = 180  # columns of the table if the output is not a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: arguments; default those of this process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of(_PROGRAM, __doc__ or "", sorted(GPUS), "a100", "spills in loops")
    given = parser.parse_args(argv)
    cases = matching(given.cases)
    if not cases:
        parser.error(f"--cases: no case matches {given.cases!r}; --list shows them")
    if given.record and given.cases:
        parser.error(f"--record: got --cases {given.cases!r}, expected a run of all cases")
    if given.list:
        print("\n".join(case.name for case in cases))
        return 0
    if reason := compiler.missing():
        parser.error(reason)
    compiler.prepare_environment()
    start = time.perf_counter()
    capability = GPUS[given.gpu].capability
    traces = _watched("Tracing", results.traces(cases, capability, given.jobs), len(cases), lambda one: "")
    kernels = results.gather(traces)
    run = Run(given.gpu, traces, [], record.load(), versions := compiler.versions())
    found = _watched("Compiling", results.compile_each(kernels, capability, given.jobs), len(kernels), run.line)
    if given.record:
        refusals = {trace.case: trace.message for trace in traces if trace.status == "refused"}
        record.save(Path(str(record.FILE)), found, given.gpu, versions, refusals)
    run = Run(given.gpu, traces, found, record.load(), versions)
    about = {
        "command": shlex.join([*_PROGRAM.split(), *argv]),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "gpu": given.gpu,
        "versions": versions,
    }
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    run.show(console)
    print(f"{time.perf_counter() - start:.0f} s.")
    if given.json:
        given.json.write_text(json.dumps(run.as_data(about), indent=1) + "\n", encoding="utf-8")
    if given.markdown:
        given.markdown.write_text(run.as_markdown(about), encoding="utf-8")
    return int(bool(run.problems()))


def _watched[T](verb: str, items: Iterable[T], total: int, line: Callable[[T], str]) -> list[T]:
    """Return the items, showing on stderr how many there are so far, or without a terminal a line for each."""
    found = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=total)
        for item in items:
            found.append(item)
            progress.advance(task)
            if not console.is_terminal and (text := line(item)):
                print(f"{len(found)} of {total}: {text}", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
