"""Races that the interpreter detects fail a test."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import launch
from support.interpreter import assert_no_races


def _copy(wait_first):
    def body(index, source, target, shared):
        plgpu.copy_gmem_to_smem(source.x, shared.x, shared.loaded)
        if wait_first:
            plgpu.barrier_wait(shared.loaded)
        shared.y[...] = shared.x[...] + 1.0
        if not wait_first:
            plgpu.barrier_wait(shared.loaded)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.y, target.y)
        plgpu.wait_smem_to_gmem(0)

    x = jnp.zeros((128,), jnp.float32)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    tile = plgpu.SMEM(x.shape, x.dtype)
    scratch = {"x": tile, "y": tile, "loaded": plgpu.Barrier()}
    return launch(body, "copy", inputs={"x": x}, out={"y": out}, scratch=scratch, grid={"block": 1}, interpret=True).y


def test_a_kernel_that_waits_for_its_copy_passes():
    with assert_no_races():
        assert jnp.all(_copy(wait_first=True) == 1.0)


def test_a_kernel_that_does_not_wait_fails():
    with pytest.raises((AssertionError, RuntimeError, jax.errors.JaxRuntimeError), match="RACE DETECTED"):
        with assert_no_races():
            jax.block_until_ready(_copy(wait_first=False))


def test_the_interpreter_works_after_a_race():
    with assert_no_races():
        assert jnp.all(_copy(wait_first=True) == 1.0)
