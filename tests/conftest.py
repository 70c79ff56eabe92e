"""Strict JAX, eight CPU devices, and checks of shapes at run time, set before anything imports the package."""

import atexit
import os
import tempfile

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
