"""The barriers that the kernels place themselves suffice, and the checker reports missing ones."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.launch import Phases, launch
from pallas_kernels.common.tiles import product, read, smem
from pallas_kernels.delta_rule import delta_rule
from pallas_kernels.gram import gram
from pallas_kernels.hypergradient import hypergradient
from support.barriers import faults

B, T, H = 1, 128, 1
PER_TOKEN = jax.ShapeDtypeStruct((B, T, H), jnp.float32)
RESETS = jnp.zeros((B, T), bool)


def keys(size, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((B, T, H, size), dtype)


def state(*shape):
    return jax.ShapeDtypeStruct((B, H, *shape), jnp.float32)


def check(names, function, *arguments):
    """Check the kernels of a function and of its gradient; `names` are those that place their own barriers."""

    def both(*arguments):
        value, gradient = jax.vjp(function, *arguments)
        return gradient(value)

    found, seen = faults(both, *arguments)
    assert seen == set(names.split())
    assert found == []


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_delta_rule(decay, erase, size):
    rule = functools.partial(delta_rule, erase=erase, scale=1.0, splits=2, resets=RESETS)
    q, initial = keys(size), state(size, size)
    names = "delta_rule_recur delta_rule_recur_back delta_rule_gradients "
    names += "delta_rule_prepare_channel delta_rule_channel_gradients" if decay == "channel" else "delta_rule_prepare"
    if decay is None:
        run = lambda q, k, v, beta, initial: rule(q, k, v, beta, initial_state=initial)
        check(names, run, q, q, q, PER_TOKEN, initial)
        return
    log_decay = PER_TOKEN if decay == "scalar" else keys(size, jnp.float32)
    run = lambda q, k, v, beta, g, initial: rule(q, k, v, beta, log_decay=g, initial_state=initial)
    check(names, run, q, q, q, PER_TOKEN, log_decay, initial)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("return_write_key", [True, False])
def test_gram(return_write_key, size):
    run = lambda k, decay, gain, center, start: gram(
        k, decay, gain, center, 1.5, start, RESETS, return_write_key=return_write_key
    )
    center = jax.ShapeDtypeStruct((H,), jnp.float32)
    check("gram gram_back", run, keys(size), PER_TOKEN, PER_TOKEN, center, state(size))


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("return_write_key", [True, False])
@pytest.mark.parametrize("forget", [False, True])
def test_hypergradient(forget, return_write_key, size):
    """The kernels that may run token by token leave their barriers to Pallas."""

    def run(k, step, beta, log_forget, start):
        log_forget = log_forget if forget else None
        return hypergradient(
            k, step, beta, log_forget, None, start, start, start, None, return_write_key=return_write_key
        )

    check("hypergradient_prepare", run, keys(size), PER_TOKEN, PER_TOKEN, PER_TOKEN, state(size))


def tile():
    return smem(64, 64, dtype=jnp.bfloat16)


def kernel(body, *scratch):
    """Return a function that runs body(input, output, *scratch) as a kernel on a bfloat16 matrix."""
    out = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    types = {str(i): each for i, each in enumerate(scratch)}

    def named(index, source, target, shared):
        body(source.x, target.out, *vars(shared).values())

    return lambda x: (
        launch(named, "probe", inputs={"x": x}, out={"out": out}, scratch=types, grid={"block": 1}, interpret=False).out
    )


def faults_in(body, *scratch):
    return faults(kernel(body, *scratch), jax.ShapeDtypeStruct((64, 64), jnp.bfloat16))[0]


def arrive(x, x_s, loaded):
    plgpu.copy_gmem_to_smem(x, x_s, loaded)
    plgpu.barrier_wait(loaded)


@pytest.mark.parametrize("commit", [True, False])
def test_a_product_of_a_tile_just_written(commit):
    def body(x, out, x_s, y_s, loaded):
        arrive(x, x_s, loaded)
        y_s[...] = (read(x_s) * 2.0).astype(jnp.bfloat16)
        if commit:
            plgpu.commit_smem()
        out[...] = product(x_s, y_s).astype(jnp.bfloat16)

    assert bool(faults_in(body, tile(), tile(), plgpu.Barrier())) is not commit


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("also_read", [True, False])
def test_an_operand_that_is_overwritten(also_read, commit):
    """That a thread has read the elements it overwrites is not enough: the products of the others read them too."""

    def body(x, out, x_s, loaded):
        arrive(x, x_s, loaded)
        squared = product(x_s, x_s)
        if also_read:
            squared = squared + read(x_s)
        if commit:
            plgpu.commit_smem()
        x_s[...] = squared.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, out)
        plgpu.wait_smem_to_gmem(0)

    assert bool(faults_in(body, tile(), plgpu.Barrier())) is not commit


@pytest.mark.parametrize("commit", [True, False])
def test_an_operand_that_the_next_iteration_overwrites(commit):
    def body(x, out, x_s, loaded):
        def step(_, total):
            arrive(x, x_s, loaded)
            total = total + product(x_s, x_s)
            if commit:
                plgpu.commit_smem()
            return total

        out[...] = jax.lax.fori_loop(0, 3, step, read(x)).astype(jnp.bfloat16)

    assert bool(faults_in(body, tile(), plgpu.Barrier())) is not commit


@pytest.mark.parametrize("commit", [True, False])
def test_a_vector_that_other_threads_wrote(commit):
    def body(x, out, x_s, sums_s, loaded):
        arrive(x, x_s, loaded)
        sums_s[...] = jnp.sum(read(x_s), axis=1)
        if commit:
            plgpu.commit_smem()
        columns = plgpu.load(sums_s, layout=plgpu.Layout.WGMMA.reduce(0))
        wide = jax.lax.broadcast_in_dim(columns, (64, 64), [1])
        out[...] = plgpu.layout_cast(wide, plgpu.Layout.WGMMA).astype(jnp.bfloat16)

    assert bool(faults_in(body, tile(), plgpu.SMEM((64,), jnp.float32), plgpu.Barrier())) is not commit


@pytest.mark.parametrize("commit", [True, False])
def test_two_uses_of_the_same_memory(commit):
    def body(x, out, phases, loaded):
        first_s, second_s = phases.first, phases.second
        arrive(x, first_s, loaded)
        value = read(first_s)
        if commit:
            plgpu.commit_smem()
        second_s[...] = value.astype(jnp.float16)
        plgpu.commit_smem()
        out[...] = read(second_s).astype(jnp.bfloat16)

    phases = Phases(first=tile(), second=smem(64, 64, dtype=jnp.float16))
    assert bool(faults_in(body, phases, plgpu.Barrier())) is not commit


@pytest.mark.parametrize("fence", [True, False])
def test_a_barrier_without_a_fence_is_not_enough_for_a_copy(fence):
    def body(x, out, x_s, loaded):
        arrive(x, x_s, loaded)
        x_s[...] = (read(x_s) * 2.0).astype(jnp.bfloat16)
        if fence:
            plgpu.commit_smem()
        else:
            plgpu.wait_smem_to_gmem(0)
        plgpu.copy_smem_to_gmem(x_s, out)
        plgpu.wait_smem_to_gmem(0)

    assert bool(faults_in(body, tile(), plgpu.Barrier())) is not fence


def test_a_thread_may_overwrite_what_it_read():
    def body(x, out, x_s, loaded):
        arrive(x, x_s, loaded)
        x_s[...] = (read(x_s) * 2.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, out)
        plgpu.wait_smem_to_gmem(0)

    assert faults_in(body, tile(), plgpu.Barrier()) == []
