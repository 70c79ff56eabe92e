"""The machine and versions of a measurement."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

import osdn_jax


def environment(command: str) -> dict[str, Any]:
    """Return the versions, machine, date and command, to be recorded with the results.

    Args:
        command: the command line that measured.

    Returns:
        A dict that JSON can hold; `load_at_start` is the 1-minute load average, or None.
    """
    devices = jax.devices()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "cpu": _cpu_model(),
        "cpu_cores": usable_cores(),
        "load_at_start": load(),
        "osdn_jax": osdn_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def load() -> float | None:
    """Return the 1-minute load average; None if the system does not report it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int | None:
    """Return the memory available without swapping, in bytes; None if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()
