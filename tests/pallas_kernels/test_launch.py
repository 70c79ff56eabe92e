"""Kernels find inputs, results and scratch under the names they were given, whatever the order of the names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import Phases, launch
from support.interpreter import assert_no_races

ROW = jax.ShapeDtypeStruct((128,), jnp.float32)
SHARED = plgpu.SMEM(ROW.shape, ROW.dtype)


def add_and_copy(x, y, z):
    """Return 2 x, y + z and a copy of z, through nested names that are not in alphabetical order."""

    def body(index, source, target, shared):
        assert source.none is None
        assert target.none is None
        assert shared.none is None
        (b,) = index("block")
        first, second = shared.phases.first, shared.phases.second
        plgpu.copy_gmem_to_smem(source.x.at[b], first.x, shared.loaded)
        for ref, tile in zip(source.pair, (shared.tiles.y, shared.tiles.a), strict=True):
            plgpu.copy_gmem_to_smem(ref.at[b], tile, shared.loaded)
        plgpu.barrier_wait(shared.loaded)
        doubled = 2.0 * first.x[...]
        plgpu.commit_smem()
        second[...] = doubled
        shared.tiles.y[...] = shared.tiles.y[...] + shared.tiles.a[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(second, target.doubled.at[b])
        plgpu.copy_smem_to_gmem(shared.tiles.y, target.more.total.at[b])
        plgpu.copy_smem_to_gmem(shared.tiles.a, target.more.copy.at[b])
        plgpu.wait_smem_to_gmem(0)

    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return launch(
        body,
        "probe",
        inputs={"x": x, "none": None, "pair": [y, z]},
        out={"more": {"total": result, "copy": result}, "none": None, "doubled": result},
        scratch={
            "tiles": {"y": SHARED, "a": SHARED},
            "phases": Phases(second=SHARED, first={"x": SHARED}),
            "none": None,
            "loaded": plgpu.Barrier(num_arrivals=3),
        },
        grid={"block": x.shape[0]},
        interpret=True,
    )


def test_names_nest_and_may_be_absent():
    x, y, z = (jnp.asarray(x) for x in np.random.default_rng(0).normal(size=(3, 2, *ROW.shape)).astype(np.float32))
    with assert_no_races():
        found = add_and_copy(x, y, z)
    np.testing.assert_array_equal(found.doubled, 2 * x)
    np.testing.assert_array_equal(found.more.total, y + z)
    np.testing.assert_array_equal(found.more.copy, z)
    assert found.none is None


def test_a_grid_of_too_many_blocks():
    body = lambda index, source, target, shared: None
    arguments = {"inputs": {}, "out": {"x": ROW}, "scratch": {}, "interpret": True}
    with pytest.raises(ValueError, match="probe: 2,147,483,648 blocks, a launch takes at most 2,147,483,647"):
        launch(body, "probe", grid={"batch": 2**16, "chunk": 2**15}, **arguments)


def test_an_empty_grid_gives_zeros():
    body = lambda index, source, target, shared: None
    found = launch(body, "probe", inputs={}, out={"x": ROW}, scratch={}, grid={"batch": 0}, interpret=True)
    np.testing.assert_array_equal(found.x, np.zeros(ROW.shape, np.float32))
