"""The Gram preconditioner's Triton kernels against the scan: values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from osdn_jax import ops
from support import assert_close, jit, random_like, value_and_gradient
from support.cases import RESETS, gram, strong_decay
from triton_kernels import gram as kernels
from triton_kernels.common.target import INTERPRETER

KERNEL = "triton_interpret"
TOLERANCES = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 1e-2}


def kernel_case(name, *, heads=1, key_dim=32, **more):
    return gram(name, batch=1, heads=heads, key_dim=key_dim, chunk_size=None, **more)


def far_decay(x, rng):
    x["log_decay"] = np.select([rng.integers(3, size=x["log_decay"].shape) == 0], [-1e9], x["log_decay"])


CASES = [
    kernel_case("nothing", length=0),
    kernel_case("one token", length=1, packed=True),
    kernel_case("two heads, packed", length=200, heads=2, packed=True),
    kernel_case("from nothing", length=63, initial=False, center=-0.2, squash=2.5),
    kernel_case("decays of 0 and -20", length=65, packed=True, change=strong_decay),
    kernel_case("decays of -1e9", length=65, change=far_decay),
    kernel_case("K 64", length=64, key_dim=64, heads=2),
    *(kernel_case(kind, length=64, change=change) for kind, change in RESETS.items()),
]
NAMED = {case.name: case for case in CASES}


def inputs(case, dtype):
    return {name: jnp.asarray(x, dtype if name == "k" else jnp.float32) for name, x in case.arrays.items()}


def check(run, scan, x, dtype):
    """Assert that values and gradients of two functions agree, to the tolerance of the type of the keys."""
    cotangents = random_like(jax.eval_shape(scan, x), seed=1)
    got, want = jax.jit(value_and_gradient(run))(x, cotangents), jit(value_and_gradient(scan))(x, cotangents)
    assert got[1]["k"].dtype == dtype
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    got, want = wide(got), wide(want)
    # The gradient of the center is a sum of terms of both signs over all tokens.
    center, expected = (tree[1].pop("center", 0.0) for tree in (got, want))
    assert_close(center, expected, 10 * TOLERANCES[dtype])
    assert_close(got, want, TOLERANCES[dtype])
    return got


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case):
    check(case.run(KERNEL), case.run("scan"), inputs(case, jnp.float32), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_keys(dtype):
    case = kernel_case("16 bits", length=65, packed=True, key_dim=64)
    check(case.run(KERNEL), case.run("scan"), inputs(case, dtype), dtype)


@pytest.mark.parametrize("key_dim", [128, 256])
def test_wide_heads(key_dim):
    case = kernel_case("wide", length=33, key_dim=key_dim)
    check(case.run(KERNEL), case.run("scan"), inputs(case, jnp.float32), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_keys(dtype):
    case = kernel_case("write keys", length=70, heads=2, packed=True)
    x, ids = inputs(case, dtype), jnp.asarray(case.segment_ids)

    def by(implementation):
        def run(x):
            return dict(zip("wa", ops.gram_write_key(**x, segment_ids=ids, implementation=implementation), strict=True))

        return run

    got = check(by(KERNEL), by("scan"), x, dtype)
    assert got[0]["w"].any()
    assert jax.eval_shape(by(KERNEL), x)["w"].dtype == dtype


def direct(x, resets=None, **options):
    """Call the kernels themselves."""
    center = x.get("center", jnp.zeros(x["k"].shape[2]))
    arrays = (x["k"], x["log_decay"], x["gain"], center, 1.5, x["initial"], resets)
    return dict(zip(("out", "final"), kernels.gram(*arrays, target=INTERPRETER, **options), strict=True))


@pytest.mark.parametrize("write_key", [False, True])
def test_splits_of_a_sequence(write_key):
    """Splits that run in parallel, the last ones without tokens, change nothing but rounding."""
    x = inputs(kernel_case("splits", length=150, heads=2, change=strong_decay), jnp.float32)
    resets = jnp.zeros((1, 150), bool).at[0, 70].set(True)
    options = {"resets": resets, "return_write_key": write_key}
    run = lambda splits: functools.partial(direct, **options, splits=splits)
    cotangents = random_like(jax.eval_shape(run(1), x), seed=1)
    one, many = (value_and_gradient(run(splits))(x, cotangents) for splits in (1, 8))
    assert_close(many, one, 1e-5)
    # Chosen by the kernels: few heads and many chunks.
    assert_close(run(None)(x), one[0], 1e-5)


def test_vmap_is_one_launch_of_a_larger_batch():
    cases = [kernel_case("vmap", length=33, heads=2, seed=seed) for seed in range(3)]
    rows = [inputs(case, jnp.float32) for case in cases]
    together = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    cotangents = random_like(jax.eval_shape(jax.vmap(direct), together), seed=1)
    got = jax.vmap(value_and_gradient(direct))(together, cotangents)
    for i, row in enumerate(rows):
        at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        want = value_and_gradient(direct)(row, at(cotangents))
        assert_close(at(got), want, 1e-6)


@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(check_vma):
    case = gram("shards", batch=2, length=33, heads=2, key_dim=32, chunk_size=None)
    x = inputs(case, jnp.float32)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "heads"))
    rows, state = PartitionSpec("data", None, "heads"), PartitionSpec("data", "heads")
    specs = {"k": rows, "log_decay": rows, "gain": rows, "initial": state, "center": PartitionSpec("heads")}
    sharded = jax.shard_map(
        direct, mesh=mesh, in_specs=(specs,), out_specs={"out": rows, "final": state}, check_vma=check_vma
    )
    cotangents = random_like(jax.eval_shape(direct, x), seed=1)
    got, want = (jax.jit(value_and_gradient(f))(x, cotangents) for f in (sharded, direct))
    assert_close(got, want, 1e-6)


def test_two_runs_are_equal_bit_for_bit():
    case = NAMED["two heads, packed"]
    x = inputs(case, jnp.float32)
    run = jax.jit(value_and_gradient(case.run(KERNEL)))
    cotangents = random_like(jax.eval_shape(case.run("scan"), x), seed=1)
    jax.tree.map(np.testing.assert_array_equal, run(x, cotangents), run(x, cotangents))


@pytest.mark.parametrize("empty", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_nothing(empty):
    """Empty inputs give empty values and gradients of the right shapes."""
    shape = [2, 3, 1]
    shape[empty] = 0
    x = {"k": jnp.zeros((*shape, 32)), "log_decay": jnp.zeros(shape), "gain": jnp.zeros(shape)}
    x |= {"center": jnp.zeros(shape[2:]), "initial": jnp.ones((shape[0], shape[2], 32))}
    value, pull = jax.vjp(direct, x)
    assert value["out"].shape == x["k"].shape
    np.testing.assert_array_equal(value["final"], x["initial"])
    (gradient,) = pull(value)
    np.testing.assert_array_equal(gradient.pop("initial"), value["final"])
    assert {name: g.shape for name, g in gradient.items()} == {name: x[name].shape for name in gradient}
    assert not any(np.any(g) for g in gradient.values())


def test_what_the_kernels_refuse():
    x = inputs(NAMED["one token"], jnp.float32)
    with pytest.raises(NotImplementedError, match="k: got 48 channels, the kernels take 32, 64, 128 or 256"):
        direct(x | {"k": jnp.zeros((1, 1, 1, 48))})
    with pytest.raises(NotImplementedError, match="k: got int32"):
        direct(x | {"k": jnp.zeros((1, 1, 1, 32), jnp.int32)})
    with pytest.raises(NotImplementedError, match="log_decay: got float16, the kernels keep float32"):
        direct(x | {"log_decay": x["log_decay"].astype(jnp.float16)})
    assert kernels.chunk_size(jnp.bfloat16, 64) == 32
