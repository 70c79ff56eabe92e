"""Check the kernels on this GPU and time them:  python -m benchmarks.gpu_suite --stage smoke check --out DIR

Five stages, best run in separate calls, in this order:

    smoke           every kernel once at T = 128, forward and gradient, each in a separate process
    check           every case against the scan in float32, or a NumPy loop in float64 (benchmarks/gpu/cases.py)
    ours            device time of the kernels and of the XLA chunkwise form, relative to the device's roofline bounds
    peers-compile   flash-linear-attention's kernels (the package fla-core), compiled into Triton's cache
    peers           their time and ours in turn, their outputs and gradients compared; on the same machine

The kernels are those for this GPU, Mosaic GPU on Hopper and Triton on other GPUs of compute capability 8.0 or later,
unless --implementation names others. Where Triton is missing or too old, --programs runs what another machine compiled
by `python -m triton_kernels.export`, from the calls that --list-calls writes.

Each case, and each rule at a shape, is a separate process: a kernel that raises, dies or hangs is reported, and the
others run. Kernels that hang in the smoke stage are not started later. A call has a budget of seconds for all its
stages; what does not fit is recorded as not run, and repeating the call does the rest.

All stages add to one file, gpu-DEVICE.json (gpu-DEVICE-triton.json for the Triton kernels), and its table .md, in --out
(default benchmarks/results), rewritten after every result. The file holds results of one device, one state of the
sources and one set of versions; other results are refused unless --restart sets the old file aside. --from names a
folder or file to continue if --out is a new folder. The output ends with the table of the call's stages.

The exit status is 1 if a kernel fails a check or does not run, and 2 if the call itself is refused. --dry uses tiny
shapes and the kernels' interpreter, on any machine, and writes nothing without --out.
"""

import argparse
import fnmatch
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from benchmarks.gpu import cases, choice, plan, programs, record, room
from benchmarks.gpu.jobs import Clock, Patience, Runner, worker_environment
from benchmarks.gpu.plan import NOT_RUN, Request, Row
from benchmarks.gpu.record import Record, Refused
from benchmarks.gpu.report import markdown
from osdn_jax._versions import installed
from osdn_jax.command import output_file
from osdn_jax.compare import environment
from osdn_jax.compare.machine import usable_cores
from triton_kernels import exported
from triton_kernels.common.cards import capability_of, device_in_use

RESULTS = Path(__file__).parent / "results"
# The interpreter is slow, and so may be a machine without a GPU: a dry run waits this long before it reports a hang.
_DRY_PATIENCE = 600.0
PATIENCE = {
    "smoke": Patience(30.0, 30.0),
    "check": Patience(45.0, 45.0),
    "ours": Patience(150.0, 45.0),
    "peers-compile": Patience(400.0, 400.0),
    "peers": Patience(150.0, 60.0),
}
_TIMED = ("ours", "peers")


def status(rows: Sequence[Row]) -> int:
    """Return 0 if every check of an existing kernel passed and all of ours ran or were out of time, else 1."""
    checks = [row for row in rows if row["section"] in ("smoke", "check")]
    wrong = any(row["status"] not in ("pass", "absent") for row in checks)
    timed = [row for row in rows if row.get("contender", "peer") not in ("peer", "xla")]
    broken = any(row["status"] not in ("measured", NOT_RUN) for row in timed)
    return int(wrong or broken)


def slug(name: str) -> str:
    """Return a device's name in a form for file names."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected seconds, at least 0")
    return value


def _slots(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a wrong command line in one line, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    about = (__doc__ or "").split(":  ")[0] + "."
    parser = _Parser(prog="python -m benchmarks.gpu_suite", description=about)
    add = parser.add_argument
    add("--stage", nargs="+", choices=plan.STAGES, default=list(plan.STAGES), help="stages to run (default all)")
    add(
        "--out", metavar="FOLDER", type=Path, help="folder of the results (default benchmarks/results, with --dry none)"
    )
    add("--from", dest="earlier", metavar="PATH", type=Path, help="results to continue (default those in --out)")
    add("--restart", action="store_true", help="rename the results in --out and begin a new file")
    add("--dry", action="store_true", help="use tiny shapes and the interpreter, to show that everything runs")
    add("--budget", metavar="SECONDS", type=_seconds, default=540.0, help="time for the whole call (default 540)")
    add("--cases", metavar="PATTERN", default="*", help="cases of smoke and check, e.g. 'scalar*' (default all)")
    add(
        "--rules",
        nargs="+",
        choices=plan.TIMED_RULES,
        default=list(plan.TIMED_RULES),
        help="rules to time (default all)",
    )
    add(
        "--implementation",
        metavar="NAME",
        help="what to check and time, without a fallback (default mosaic_gpu on Hopper and with --dry, else triton)",
    )
    also = "implementations to time in the same rounds, each a column of its own, e.g. triton; they are not checked"
    add("--also", metavar="NAME", nargs="+", default=[], help=also)
    folder = "run programs of python -m triton_kernels.export in place of the Triton kernels, without Triton (default: "
    folder += f"{exported.VARIABLE})"
    add("--programs", metavar="FOLDER", type=Path, help=folder)
    add(
        "--list-calls",
        metavar="FILE",
        type=Path,
        help="write the calls of the Triton kernels, to export them",
    )
    modules = "modules to import first; they may register other implementations"
    add("--import", dest="imports", metavar="MODULE", nargs="+", default=[], help=modules)
    silence = "kill a job without a sign of life for this long (default: depends on the stage)"
    add("--patience", metavar="SECONDS", type=_seconds, help=silence)
    add(
        "--slots",
        metavar="N",
        type=_slots,
        help="processes to run or prepare in parallel (default: by cores and memory)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0, 1 if a kernel fails a check or does not run, 2 if the call is refused.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _arguments(argv)
    clock = Clock(given.budget, time.time())
    stages = [stage for stage in plan.STAGES if stage in given.stage]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # before the device is asked for its name
    try:
        if given.dry or given.list_calls is not None:
            jax.config.update("jax_platforms", "cpu")  # as the jobs' processes; a GPU that is there is not asked
        if given.list_calls is not None:
            return _list_calls(given, stages)
        about = environment(shlex.join(["python", "-m", "benchmarks.gpu_suite", *argv]))
        if about["platform"] != "gpu" and not given.dry:
            raise Refused(f"got a {about['device']}, the suite needs a GPU; --dry shows on any machine that it runs")
        implementation = choice.implementation(given.implementation, given.dry)
        also = _also(given, implementation)
        _check_pattern(given.cases, stages, given.dry, implementation)
        results = _open(given, about, implementation)
    except Refused as reason:
        print(f"gpu_suite: {reason}", file=sys.stderr)
        return 2
    request = Request(implementation, given.dry, tuple(given.rules), given.cases, tuple(given.imports), also)
    with tempfile.TemporaryDirectory() as folder:
        slots = given.slots or room.together(about["device"], usable_cores())
        variables = worker_environment(os.environ, given.dry, (implementation, *also))
        if given.programs is not None:
            variables[exported.VARIABLE] = str(given.programs.resolve())
        runner = Runner(clock, Path(folder), slots, variables, results.add)
        for stage in stages:
            _run(stage, runner, results, request, _patience(stage, given))
    sections = {plan.SECTIONS[stage] for stage in stages} | ({"ceilings"} if set(stages) & set(_TIMED) else set())
    results.write()
    print("\n".join(markdown(results.content(), sections)))
    return status([row for row in results.rows if row["section"] in sections])


def _run(stage: str, runner: Runner, results: Record, request: Request, patience: Patience) -> None:
    todo = plan.plan_stage(stage, results.rows, request)
    results.owe(todo.owed)
    for row in todo.skipped:
        results.add(row)
    runner.run(todo.jobs, patience, timed=stage in _TIMED, most=room.waiting(results.identity["device"]))


def _patience(stage: str, given: argparse.Namespace) -> Patience:
    if given.patience is not None:
        return Patience(given.patience, given.patience)
    return Patience(_DRY_PATIENCE, _DRY_PATIENCE) if given.dry else PATIENCE[stage]


def _also(given: argparse.Namespace, implementation: str) -> tuple[str, ...]:
    """Return the implementations to time next to the one that is checked, if this machine has what they need."""
    names = tuple(dict.fromkeys(choice.implementation(name, given.dry) for name in given.also))
    if given.programs is None and choice.TRITON in (implementation, *names) and os.environ.get(exported.VARIABLE):
        given.programs = Path(os.environ[exported.VARIABLE])
    if reason := choice.absent(implementation, given.programs is not None):
        raise Refused(f"--implementation {implementation}: {reason}")
    for name in names:
        if name in (implementation, "chunk", *plan.CONTENDERS):
            raise Refused(f"--also: got {name}, which is timed anyway")
        if reason := choice.absent(name, given.programs is not None):
            raise Refused(f"--also {name}: {reason}")
    if given.programs is not None and choice.TRITON not in (implementation, *names):
        raise Refused(f"--programs: for triton on a GPU, here it is {', '.join((implementation, *names))}")
    return names


def _programs(folder: Path | None) -> str | None:
    """Return where exported programs come from."""
    if folder is None:
        return None
    try:
        return programs.described(folder, capability_of(device_in_use()))
    except ValueError as error:
        raise Refused(f"--programs: {str(error).removeprefix(f'{exported.VARIABLE}: ')}") from error


def _list_calls(given: argparse.Namespace, stages: Sequence[str]) -> int:
    try:
        file = output_file("list-calls", str(given.list_calls))
    except ValueError as error:
        raise Refused(str(error)) from error
    _check_pattern(given.cases, stages, False, "triton")
    stages = [stage for stage in stages if stage in programs.STAGES]
    if not stages:
        raise Refused(f"--list-calls: name one of the stages {', '.join(programs.STAGES)}")
    count = programs.write_calls(file, stages, given.rules, given.cases)
    print(f"{count} calls in {file}: python -m triton_kernels.export --calls {file} --gpu GPU --out FOLDER")
    return 0


def _check_pattern(pattern: str, stages: Sequence[str], dry: bool, implementation: str) -> None:
    sections = [stage for stage in ("smoke", "check") if stage in stages]
    names = [name for section in sections for name in cases.cases_of(section, dry, implementation)]
    if names and not fnmatch.filter(names, pattern):
        raise Refused(f"--cases: no case matches {pattern!r}; expected a pattern such as 'scalar*'")


def _open(given: argparse.Namespace, about: dict[str, Any], implementation: str) -> Record:
    """Return the record to add to, of this device and these sources."""
    versions = installed(record.PACKAGES)
    identity: dict[str, Any] = {
        "device": about["device"],
        "dry": given.dry,
        "source": record.source(),
        "implementation": implementation,
        "programs": _programs(given.programs),
        **{name: about[name] for name in ("jax", "jaxlib", "python")},
        **{name: versions.get(name) for name in record.PACKAGES},
    }
    call = {name: about[name] for name in ("date", "command", "cpu", "cpu_cores", "numpy", "osdn_jax")}
    call |= {"commit": record.commit(), "driver": record.driver(), "budget": given.budget}
    out = given.out or (None if given.dry else RESULTS)
    kernels = "-triton" if cases.is_triton(implementation) else ""
    name = f"gpu-{'dry' if given.dry else slug(about['device'])}{kernels}.json"
    file = None if out is None else out / name
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"--out: cannot make {file.parent}: {error.strerror}") from error
    return Record({"identity": identity, "call": call}, file, _earlier(given, file, name))


def _earlier(given: argparse.Namespace, file: Path | None, name: str) -> Path | None:
    """Return the file to continue, if it is not the file to write."""
    if given.restart and file is not None:
        record.set_aside(file)
    if given.earlier is None:
        return None
    if given.restart:
        raise Refused("--restart: begins a new file, so it cannot be combined with --from")
    if file is not None and file.exists():
        raise Refused(f"--from: {file} has results already; leave --from out to add to them")
    if given.earlier.is_dir():
        return given.earlier / name  # it may be of another device; then there is nothing to continue
    if not given.earlier.exists():
        raise Refused(f"--from: {given.earlier} is not there")
    return given.earlier


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)  # an exception, so that the jobs' processes are killed too


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(main())
