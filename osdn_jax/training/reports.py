"""Reports of processes about themselves, and their comparison."""

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import osdn_jax
from osdn_jax.training.config import ABSENT, ConfigError

_SHOWN = 4  # differences in one message


@functools.cache
def software() -> dict[str, str]:
    """Return {package: version} of this process, with a digest of this package's files to tell commits apart."""
    packages = ("jax", "jaxlib", "flax", "optax", "grain", "numpy")
    versions = {name: getattr(importlib.import_module(name), "__version__", "unknown") for name in packages}
    return {"osdn_jax": f"{osdn_jax.__version__} (files {_digest('osdn_jax', 'pallas_kernels')})", **versions}


def _digest(*packages: str) -> str:
    digest = hashlib.sha256()
    for package in packages:
        found = importlib.util.find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder)}".encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def differences(reports: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """Return a line for each key whose value differs between processes; a report of None is skipped."""
    present = {number: report for number, report in enumerate(reports) if report is not None}
    found = []
    for key in sorted(set().union(*present.values())):
        values: dict[Any, tuple[Any, list[int]]] = {}
        for number, report in present.items():
            value = report.get(key, ABSENT)
            values.setdefault(_comparable(value), (value, []))[1].append(number)
        if len(values) > 1:
            listed = " and ".join(f"{value!r} in {name_processes(numbers)}" for value, numbers in values.values())
            found.append(f"{key}: got {listed}, expected the same in all")
    return found


def _comparable(value: Any) -> str:
    """Return text that is equal for equal values: 1.0 equals 1, as in config.json, but True does not."""
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)


def check_same(reports: Sequence[Mapping[str, Any] | None]) -> None:
    """Raise ConfigError, naming keys and values, if processes differ."""
    found = differences(reports)
    if found:
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ConfigError("; ".join(found[:_SHOWN]) + more)


def failures(reasons: Sequence[str | None]) -> str:
    """Return which processes failed and why, in one line; "" if none did."""
    by_reason: dict[str, list[int]] = {}
    for number, reason in enumerate(reasons):
        if reason is not None:
            by_reason.setdefault(reason, []).append(number)
    if len(by_reason) == 1 and None not in reasons:
        return next(iter(by_reason))
    return "; ".join(f"{name_processes(numbers)} failed: {reason}" for reason, numbers in by_reason.items())


def name_processes(numbers: list[int]) -> str:
    """Return a phrase such as "process 3" or "processes 0-2 and 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    listed = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return f"process {listed}" if len(numbers) == 1 else f"processes {listed}"
