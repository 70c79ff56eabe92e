"""Strict JAX, eight CPU devices, shapes checked at run time: before anything imports the package."""

import atexit
import os
import tempfile

import jax
import jaxtyping
import matplotlib
import pytest
from hypothesis import settings

pytest.register_assert_rewrite("support")
import support.typechecking  # noqa: E402, F401 (the hook below wants it imported, and only now is it rewritten)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
matplotlib.use("Agg")

# Compiling is most of what the tests do. Machine code is optimised little, and each program compiled once for all
# processes of a run: pytest-xdist's workers and what tests start find the directory in the environment.
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

# Only the packages with arrays in their signatures: the others' arguments are plain, and checked by themselves.
jaxtyping.install_import_hook(["osdn_jax.ops", "osdn_jax.nn"], "support.typechecking.check")


# The same examples on every run; the first of them compiles, however long that takes.
settings.register_profile("repository", derandomize=True, deadline=None)
settings.load_profile("repository")


@pytest.fixture(scope="module")
def float64():
    """Doubles, for modules that ask for it as a whole: pytestmark = pytest.mark.usefixtures("float64")."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def our_checks():
    """Leaves wrong arguments to the package's own checks: outside the tests jaxtyping's are not there."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
