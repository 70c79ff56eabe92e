"""Strict JAX, eight CPU devices, shapes checked at run time: before anything imports the package."""

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
