"""Offsets in arrays of more than 2^31 elements, which 32 bits do not hold."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.programs import program, public_function
from support.triton_examples import copy_rows
from support.triton_offsets import check_offsets
from triton_kernels.common.launch import launch, recorded
from triton_kernels.common.target import INTERPRETER, Target

CASES = [("delta_rule", decay, True) for decay in ("scalar", "channel")]
CASES += [("delta_rule", "scalar", False)]
CASES += [(name, None, gradient) for name in ("hypergradient", "gram") for gradient in (False, True)]


def launches(function, *arguments):
    jax.clear_caches()
    with recorded() as found:
        jax.eval_shape(function, *arguments)
    jax.clear_caches()
    return found


def check(found):
    """Run the last program of each launch; return the elements of the largest array."""
    largest = 0
    for one in found:
        count = next(iter(one.inputs.values())).shape[0] * one.programs
        check_offsets(one, [count - 1])
        largest = max([largest, *(x.size for x in (*one.inputs.values(), *one.outputs.values()))])
    return largest


@pytest.mark.parametrize("shape", [(2**20, 64, 64), (2, 2**26, 64)])  # many batch rows, or long ones
def test_offsets_of_32_bits_are_found(shape):
    def copy(x, long):
        options = {"scalars": {"rows": shape[1]}, "constants": {"SIZE": shape[2], "LONG": long}, "programs": 1}
        return launch(copy_rows, inputs={"x_ptr": x}, outputs={"out_ptr": x}, target=INTERPRETER, **options).out_ptr

    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert check(launches(functools.partial(copy, long=True), x)) >= 2**32
    with pytest.raises(IndexError, match=r"copy_rows, program \d+: .*_ptr: bytes -\d+ to -\d+"):
        check(launches(functools.partial(copy, long=False), x))


@pytest.mark.parametrize(("name", "decay", "gradient"), CASES)
def test_offsets_of_the_kernels(name, decay, gradient):
    """Every array of tokens has 2^34 elements, 2^32 of them in one batch row."""
    is_delta_rule = name == "delta_rule"
    options = ("documents", "write-key") if is_delta_rule else ("documents", "multiply")
    sizes = {"batch": 4, "heads": 256, "length": 2**18}
    case = Case(name, gradient, 64, 64 if is_delta_rule else None, decay, options, **sizes)
    function, arguments = program(case, functools.partial(public_function("triton_kernels", name), target=Target(80)))
    assert check(launches(function, *arguments)) >= 2**34
