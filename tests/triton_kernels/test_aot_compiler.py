"""Compilation of kernels for a GPU that is not here, as jax-triton specialises them."""

import functools
import os

import jax
import jax.numpy as jnp
import pytest
import triton
from jax_triton import triton_lib
from triton.backends.compiler import GPUTarget

from pallas_kernels.aot.cases import Case
from support.triton_examples import scale_rows, spill_in_loop
from triton_kernels.aot.compiler import compile_kernel, prepare_environment
from triton_kernels.aot.launches import trace
from triton_kernels.aot.specialization import specialize
from triton_kernels.common.launch import launch, recorded
from triton_kernels.common.mend import mend
from triton_kernels.common.target import Target

pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("JAX_PLATFORMS", "TRITON_ALWAYS_COMPILE", "TRITON_DUMP_PTXAS_LOG", "TRITON_DEFAULT_FP_FUSION"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))  # so that what follows is undone
    prepare_environment()


def scaled(x, factor, capability=80, **options):
    """x [batch, programs, rows, size] times a factor, as the kernels are launched."""
    _, programs, rows, size = x.shape
    return launch(
        scale_rows,
        inputs={"x_ptr": x},
        outputs={"out_ptr": jax.ShapeDtypeStruct(x.shape, jnp.float32)},
        scalars={"rows": rows, "factor": factor},
        constants={"SIZE": size, "programs": programs},
        programs=programs,
        target=Target(capability),
        **options,
    ).out_ptr


def recorded_launch(function, *shapes):
    with recorded() as found:
        jax.eval_shape(function, *shapes)
    (one,) = found
    return one


@pytest.mark.parametrize(("rows", "factor"), [(16, 0.5), (1, 0.5), (5, 1.0)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_code_is_what_jax_triton_hands_to_xla(rows, factor, dtype, monkeypatch):
    """Integers are not taken to be divisible by 16, scalars of 1 are constants, arrays are aligned."""
    mend()  # before the compiler is replaced, or its repair would be undone with it
    seen = []
    compile_ttir = triton_lib.compile_ttir_inplace

    def listening(*arguments):
        seen.append(compile_ttir(*arguments))
        return seen[-1]

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", listening)
    x = jax.ShapeDtypeStruct((2, 3, rows, 64), dtype)
    function = functools.partial(scaled, factor=factor, warps=2, stages=3)
    specialization = specialize(recorded_launch(function, x))
    jax.jit(lambda x: function(x)).trace(x).lower(lowering_platforms=("cuda",))
    compiled = triton.compile(specialization.source(), GPUTarget("cuda", 80, 32), specialization.options())
    assert compiled.asm["ptx"] == seen[0].binary
    assert compiled.metadata.shared == seen[0].shared_mem_bytes


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_resources_of_a_kernel(capability):
    x = jax.ShapeDtypeStruct((2, 3, 16, 64), jnp.bfloat16)
    outcome = compile_kernel(specialize(recorded_launch(functools.partial(scaled, factor=0.5), x)), capability)
    assert outcome.message == ""
    kernel = outcome.kernel
    assert 8 <= kernel.registers <= 64
    assert (kernel.spill_stores, kernel.spill_loads, kernel.in_loops, kernel.outside) == (0, 0, 0, 0)
    assert kernel.threads == 128
    assert 0 < kernel.seconds < 60


def test_spills_in_a_loop_are_seen():
    def function(x):
        return launch(
            spill_in_loop,
            inputs={"x_ptr": x},
            outputs={"out_ptr": x},
            scalars={"rows": 3},
            constants={"SIZE": 64},
            programs=1,
            target=Target(80),
            warps=1,
        ).out_ptr

    x = jax.ShapeDtypeStruct((1, 64, 64), jnp.float32)
    kernel = compile_kernel(specialize(recorded_launch(function, x)), 80).kernel
    assert kernel.in_loops > 0
    assert kernel.spill_stores > 0


def test_a_kernel_that_does_not_compile_says_why():
    x = jax.ShapeDtypeStruct((2, 3, 16, 48), jnp.bfloat16)  # no power of two
    outcome = compile_kernel(specialize(recorded_launch(functools.partial(scaled, factor=0.5), x)), 80)
    assert outcome.kernel is None
    assert "power of 2" in outcome.message


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("function", ["delta_rule", "hypergradient", "gram"])
def test_the_launches_of_a_case(function, gradient):
    """The same in a second call: no trace is kept from the first."""
    dims = (64, 64, "scalar") if function == "delta_rule" else (64,)
    case = Case(function, gradient, *dims, batch=1, heads=2, length=32768)
    first, second = trace(case, 80), trace(case, 80)
    assert first.message == ""
    assert first == second
    assert len(first.launches) >= 1 + gradient
    few = {kernel.kernel for kernel, use in first.launches if not use.must_fill}
    assert few <= {"hypergradient_scan", "hypergradient_scan_backward"}  # one program per head


def test_a_case_that_is_refused_or_fails():
    refused = trace(Case("delta_rule", False, 48, 48, "none"), 80)
    assert (refused.status, refused.launches) == ("refused", [])
    assert "48" in refused.message
    assert trace(Case("no_such_function", False, 64), 80).status == "failed"
