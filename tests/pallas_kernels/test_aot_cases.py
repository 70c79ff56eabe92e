"""The cases that `pallas_kernels.aot` compiles, and their programs."""

import jax
import pytest

from pallas_kernels.aot.cases import all_cases, matching
from pallas_kernels.aot.programs import program, splits
from support.aot import NAME


def test_cases_have_names_of_their_own_and_are_found_by_them():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert NAME in names
    assert [case.name for case in matching(NAME)] == [NAME]
    assert matching("") == all_cases()
    assert {case.key_dim for case in matching("forward/channel/K64*")} == {64}
    assert matching("no such case") == []


def test_cases_cover_what_the_functions_take():
    cases, functions = all_cases(), ("delta_rule", "hypergradient", "gram")
    sizes = {(64, 64), (128, 128), (256, 256), (64, 256), (256, 64), (128, 256)}
    for gradient in (False, True):
        for decay in ("scalar", "channel"):
            assert sizes <= {(c.key_dim, c.value_dim) for c in cases if (c.gradient, c.decay) == (gradient, decay)}
        assert {"none", "scalar", "channel"} <= {case.decay for case in cases if case.gradient == gradient}
    options = {option for case in cases for option in case.options}
    assert options == {"no-erase", "documents", "grouped", "write-key", "forget", "bounds", "multiply"}
    assert {case.dtype for case in cases if case.function == "delta_rule"} == {"bfloat16", "float16"}
    assert {(case.function, case.length) for case in cases if case.mapped} >= {("delta_rule", 2**14), ("gram", 2**14)}
    every = {
        (name, gradient, split) for name in functions for gradient in (False, True) for split in ("batch", "heads")
    }
    assert every == {(case.function, case.gradient, case.sharded) for case in cases if case.sharded}


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_case_is_a_program(case):
    function, arguments = program(case)
    assert callable(function)
    shapes = [x.shape for x in jax.tree.leaves(arguments)]
    assert any(case.key_dim in shape for shape in shapes)
    assert case.value_dim is None or any(case.value_dim in shape for shape in shapes)
    assert ("documents" in case.options) == any(x.dtype == bool for x in jax.tree.leaves(arguments))


@pytest.mark.parametrize("name", ["forward/none/K64V64/bf", "gradient/none/K64V64/bf"])
def test_a_program_traces(name):
    (case,) = matching(name)
    function, arguments = program(case)
    (results,) = [jax.eval_shape(function, *arguments)]
    wanted = arguments[0] if case.gradient else {"out": arguments[0]["v"], "state": arguments[0]["initial_state"]}
    assert [x.shape for x in jax.tree.leaves(results)] == [x.shape for x in jax.tree.leaves(wanted)]


def kernel_grids(jaxpr):
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "grid_names"):
                yield tuple(value.grid)
            elif hasattr(value, "eqns"):
                yield from kernel_grids(value)


@pytest.mark.parametrize("case", matching("/T"), ids=lambda case: case.name)
def test_the_grid_of_every_kernel_is_one_axis(case):
    """CUDA takes 65,535 blocks along the other axes, and a larger launch aborts the process."""
    function, arguments = program(case)
    grids = list(kernel_grids(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert {len(grid) for grid in grids} == {1}
    assert max(grids)[0] > 65535


@pytest.mark.parametrize("case", [case for case in all_cases() if case.sharded], ids=lambda case: case.name)
def test_a_program_for_two_gpus_is_split_along_its_batch_or_its_heads(case):
    _, arguments = program(case)
    specs = splits(case, arguments, "x")
    sizes = [
        x.shape[tuple(spec).index("x")]
        for x, spec in zip(*map(jax.tree.leaves, (arguments, specs)), strict=True)
        if "x" in tuple(spec)
    ]
    assert set(sizes) <= ({case.batch} if case.sharded == "batch" else {case.heads, case.heads // 2})
    assert len(sizes) >= 4
