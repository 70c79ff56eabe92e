"""Are the kernels right on this GPU, and how fast?  python -m benchmarks.gpu_suite

Every kernel against the float32 scan (benchmarks/gpu/check.py), then device time of ours, of our XLA chunkwise form and
of flash-linear-attention where it is installed (timing.py, peers.py), beside the device's floors (floors.py). Each case
and each rule at a shape is a process of its own: a kernel that raises, dies or hangs is reported, and the others go on.
All of it keeps a budget of seconds; what did not fit, or is not installed, is in the tables by name.

Writes gpu-DEVICE.json and .md after every result, to benchmarks/results unless --out says where, and prints the
latter. The exit status is 1 where a kernel is not shown to be right or does not run. --dry takes tiny shapes and the
kernels' interpreter, on any machine, and writes only where --out says.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import plan
from benchmarks.gpu.jobs import Clock, Runner
from benchmarks.gpu.plan import Row
from benchmarks.gpu.report import markdown
from osdn_jax.comparison import environment
from osdn_jax.comparison.environment import usable_cores

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax-cuda13-plugin", "torch", "triton", "flash-linear-attention", "fla-core")


class Record:
    """What is known so far, in files that are whole at any moment."""

    def __init__(self, about: dict[str, Any], clock: Clock, file: Path | None) -> None:
        self.about, self.clock, self.file = about, clock, file
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.rows.sort(key=plan.place)
        print(f"{self.clock.spent():6.1f} s  {brief(row)}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> str:
        """Writes the files and returns the table."""
        seconds = round(self.clock.spent(), 1)
        content = {"environment": self.about, "budget": self.clock.budget, "seconds": seconds, "rows": self.rows}
        table = "\n".join(markdown(content))
        if self.file is not None:
            _replace(self.file, json.dumps(content, indent=1) + "\n")
            _replace(self.file.with_suffix(".md"), table + "\n")
        return table


def status(rows: Sequence[Row]) -> int:
    """0 where every check passes (a kernel that does not exist is none) and everything of ours ran or had no time."""
    wrong = any(row["section"] == "check" and row["status"] not in ("pass", "absent") for row in rows)
    broken = any(row.get("contender") == "ours" and row["status"] not in ("measured", "left out") for row in rows)
    return int(wrong or broken)


def brief(row: Row) -> str:
    """A row in one line of the log."""
    names = ("section", "case", "keys", "shape", "rule", "program", "contender", "status", "worst", "error", "reason")
    words = [str(row[name]) for name in names if name in row]
    if "median_seconds" in row:
        words.append(f"{row['median_seconds'] * 1e3:.3f} ms")
    return " ".join(words)


def slug(name: str) -> str:
    """A device's name as a part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def driver() -> str | None:
    """The version of NVIDIA's driver, where there is one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _replace(file: Path, text: str) -> None:
    new = file.with_name(file.name + ".new")
    new.write_text(text)
    new.replace(file)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").splitlines()[0].split("?  ")[0] + "?"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results, with --dry none)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes and the interpreter: does everything run?")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it (default 540)")
    parser.add_argument("--sections", nargs="+", choices=plan.SECTIONS, default=list(plan.SECTIONS))
    parser.add_argument("--rules", nargs="+", choices=plan.RULES, default=list(plan.RULES), help="to time")
    parser.add_argument(
        "--implementation",
        help="of ours (default mosaic_gpu, with --dry mosaic_gpu_interpret), never another in its place",
    )
    parser.add_argument("--patience", type=float, default=320.0, help="seconds for one process (default 320)")
    parser.add_argument("--slots", type=int, help="processes that prepare at once (default 1.5 for each core)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    given = _arguments(argv)
    clock = Clock(given.budget, time.time())
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # before the device is asked for its name
    about = environment(shlex.join(["python", "-m", "benchmarks.gpu_suite", *argv]))
    if about["platform"] != "gpu" and not given.dry:
        sys.exit(f"got a {about['device']}, the suite needs a GPU; --dry shows on any machine that it runs")
    implementation = given.implementation or ("mosaic_gpu_interpret" if given.dry else "mosaic_gpu")
    packages = {name: version(name) for name in PACKAGES}
    about |= {"driver": driver(), "packages": packages, "implementation": implementation}
    out = given.out or (None if given.dry else RESULTS)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    name = "dry" if given.dry else slug(about["device"])
    record = Record(about, clock, None if out is None else out / f"gpu-{name}.json")
    stages = plan.stages(given.sections, given.rules, implementation, given.dry)
    slots = given.slots or usable_cores() * (2 if given.dry else 3) // 2
    with tempfile.TemporaryDirectory() as folder:
        Runner(clock, Path(folder), slots, given.patience, given.dry, record.add).run(stages)
    print(record.write())
    return status(record.rows)


if __name__ == "__main__":
    sys.exit(main())
