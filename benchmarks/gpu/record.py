"""The file that all stages add to, complete at any time: rows, the calls that produced them, and their identity."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import plan
from benchmarks.gpu.plan import NOT_RUN, Row
from benchmarks.gpu.report import markdown
from osdn_jax._files import write_atomically

ROOT = Path(__file__).parents[2]
SOURCES = ("pallas_kernels", "triton_kernels", "osdn_jax/ops", "osdn_jax/compare", "benchmarks/gpu")
# fla-core is the only package of flash-linear-attention that is needed.
PACKAGES = ("jax-cuda13-plugin", "torch", "triton", "jax-triton", "fla-core", "tilelang")
FORMAT = 2


class Refused(Exception):
    """A call that cannot run; the message is one line."""


class Record:
    """The results so far."""

    def __init__(self, about: Mapping[str, Any], file: Path | None, earlier: Path | None = None) -> None:
        """Continue the results of the file, or of an earlier one.

        Args:
            about: "identity", on which all results of a file must agree, and "call", a description of this call.
            file: the file to write; None: none.
            earlier: the file to continue; default `file`.

        Raises:
            Refused: the file is of another device, other sources or versions, or cannot be read.
        """
        self.file, self.identity = file, dict(about["identity"])
        self.rows: list[Row] = []
        self.calls: list[dict[str, Any]] = []
        earlier = file if earlier is None else earlier
        if earlier is not None and earlier.exists():
            self._continue(earlier)
        self.calls.append({**about["call"], "seconds": 0.0})
        self.start = time.time()

    def _continue(self, earlier: Path) -> None:
        try:
            content = json.loads(earlier.read_text())
            before, self.rows, self.calls = content["identity"], content["rows"], content["calls"]
            if content["format"] != FORMAT:
                raise KeyError(f"format {content['format']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{earlier}: cannot be read as results of this suite ({error}); --restart sets it aside"
            raise Refused(message) from error
        other = differences(before, self.identity)
        if other:
            raise Refused(f"{earlier}: its results are of {other}; --restart sets it aside, --out writes elsewhere")
        self.identity = {**before, **{name: value for name, value in self.identity.items() if value is not None}}

    def owe(self, keys: Iterable[Row]) -> None:
        """Record what a stage is going to do, so that what it does not reach is in the file too."""
        for row in plan.missing_rows(keys, self.rows, NOT_RUN, plan.NOT_REACHED):
            self.rows.append({**row, "call": len(self.calls) - 1})
        self.write()

    def add(self, row: Row) -> None:
        """Replace the earlier row of the same key; the new one lists the earlier statuses, except "not run"."""
        key = plan.key_of(row)
        before = next((r for r in self.rows if plan.key_of(r) == key), None)
        print(f"{time.time() - self.start:6.1f} s  {brief(row)}", file=sys.stderr, flush=True)
        if before is not None:
            if row["status"] == NOT_RUN and before["status"] != NOT_RUN:
                return
            self.rows.remove(before)
            history = before.get("before", []) + [before["status"]] * (before["status"] not in (NOT_RUN, "missing"))
            row = {**row, **({"before": history} if history else {})}
        self.rows.append({**row, "call": len(self.calls) - 1})
        self.rows.sort(key=plan.place)
        self.write()

    def content(self) -> dict[str, Any]:
        """Return all that the file holds, as of the last `write`."""
        return {"format": FORMAT, "identity": self.identity, "calls": self.calls, "rows": self.rows}

    def write(self) -> None:
        """Write the file and its table, with the seconds that the call has taken so far."""
        self.calls[-1]["seconds"] = round(time.time() - self.start, 1)
        if self.file is not None:
            content = self.content()
            write_atomically(self.file, json.dumps(content, indent=1) + "\n")
            write_atomically(self.file.with_suffix(".md"), "\n".join(markdown(content)) + "\n")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differences of two identities; a package that is missing on one side is not one."""
    names = sorted(set(before) | set(now))
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    return ", ".join(f"{n} {a} (here {b})" for n, a, b in pairs if a is not None and b is not None and a != b)


def set_aside(file: Path) -> None:
    """Rename a record and its table, to make room for new ones."""
    for old in (file, file.with_suffix(".md")):
        number = 1
        while (new := old.with_name(f"{old.stem}.{number}{old.suffix}")).exists():
            number += 1
        if old.exists():
            old.rename(new)


def source() -> str:
    """Return a hash of the code that results depend on: a copy of the sources has no commit."""
    found = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def commit() -> str | None:
    """Return the commit that is checked out, with a plus if files differ from it; None without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def driver() -> str | None:
    """Return the version of NVIDIA's driver; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def brief(row: Row) -> str:
    """Return a row as one line of the log."""
    names = (*plan.key_of(row), "status", "worst", "error", "reason")
    words = [str(row[name]) for name in names if name in row]
    if "median_seconds" in row:
        words.append(f"{row['median_seconds'] * 1e3:.3f} ms")
    return " ".join(words)
