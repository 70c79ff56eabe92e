"""Strict JAX, eight CPU devices, and checks of shapes at run time, set before anything imports the package."""

import atexit
import ctypes
import gc
import math
import os
import sys
import tempfile
from pathlib import Path

import jax
import jaxtyping
import matplotlib
import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")
import support.typechecking  # noqa: E402, F401 (the hook below needs it, and its assertions are rewritten only from here on)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
matplotlib.use("Agg")

# Compilation takes most of the tests' time. Machine code is optimised little, and each program is compiled once for all
# processes of a run: pytest-xdist's workers and processes that tests start find the directory in the environment.
if "OSDN_TESTS_PROGRAMS" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="osdn-programs-")
    atexit.register(programs.cleanup)
    os.environ["OSDN_TESTS_PROGRAMS"] = programs.name
for name, value in {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": os.environ["OSDN_TESTS_PROGRAMS"],
    "jax_persistent_cache_min_compile_time_secs": 0,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

# Only the packages with arrays in their signatures: the others have plain arguments and check them themselves.
jaxtyping.install_import_hook(["osdn_jax.ops", "osdn_jax.nn"], "support.typechecking.check")


# The same examples on every run, without a deadline: the first one compiles.
settings.register_profile("repository", derandomize=True, deadline=None)
settings.load_profile("repository")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Return the number of processes of -n logical: one per core that may be used, if each has 3 GB of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = Path(
        "/sys/fs/cgroup/cpu.max"
    )  # of a container, in microseconds per period: "200000 100000" or "max 100000"
    if quota.is_file() and (limit := quota.read_text().split())[0] != "max":
        cores = min(cores, math.ceil(int(limit[0]) / int(limit[1])))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, round(memory / 3e9)))


_MOST_MEMORY = 3e9  # bytes of a process before it drops its compiled programs, which the directory keeps


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """Drop compiled programs after a module that leaves a process with much memory; thousands of them take 20 GB."""
    yield
    pages = Path("/proc/self/statm")
    if pages.is_file() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST_MEMORY:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # glibc keeps freed memory otherwise


@pytest.fixture(scope="module")
def float64():
    """Enable float64 for a whole module: pytestmark = pytest.mark.usefixtures("float64")."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def our_checks():
    """Leave wrong arguments to the package's checks: outside the tests those of jaxtyping do not exist."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
