"""jit, vmap, remat and shard_map do not change values and gradients; forward mode of the scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from support import assert_close, jit, oracle, random_like, value_and_gradient
from support.cases import IMPLEMENTATIONS, NAMED

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

B, T, HK, H, K, V = 4, 21, 2, 4, 8, 6
TOLERANCE = 1e-12


def inputs():
    rng = np.random.default_rng(0)
    k = rng.normal(size=(B, T, HK, K))
    x = {
        "q": rng.normal(size=(B, T, HK, K)),
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.normal(size=(B, T, H, V)),
        "beta": rng.uniform(size=(B, T, H)),
        "log_decay": -rng.uniform(0, 0.3, size=(B, T, H)),
        "log_forget": -rng.uniform(0, 0.1, size=(B, T, H)),
    }
    return jax.tree.map(jnp.asarray, x)


def outputs(x, implementation):
    """Run with default initial states: as carries of scans they must vary over the mesh axes of the inputs."""
    o, state = ops.os_gdn(
        **x, initial=1.0, eta=0.5, bounds=(0.9, 1.05), anchor=0.5, chunk_size=8, implementation=implementation
    )
    return o, state


@functools.cache
def expected():
    x = inputs()
    cotangents = random_like(jax.eval_shape(lambda x: outputs(x, "scan"), x), seed=1)
    return cotangents, *jit(value_and_gradient(lambda x: outputs(x, "scan")))(x, cotangents)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shard_map_and_remat(implementation):
    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    token, state = P("data", None, "heads"), P("data", "heads")
    x = inputs()
    f = jax.checkpoint(functools.partial(outputs, implementation=implementation))
    sharded = jax.shard_map(f, mesh=mesh, in_specs=(dict.fromkeys(x, token),), out_specs=(token, state))
    cotangents, value, gradient = expected()
    if implementation is None:
        assert_close(jit(sharded)(x), value, TOLERANCE)
        return
    got_value, got_gradient = jit(value_and_gradient(sharded))(x, cotangents)
    assert len(got_value[0].sharding.device_set) == 8
    assert_close(got_value, value, TOLERANCE)
    assert_close(got_gradient, gradient, TOLERANCE)


def test_shard_map_of_value_heads_that_share_a_key_head():
    """Keys, and so the Gram preconditioner, are replicated; values and decays are sharded by head."""
    rng = np.random.default_rng(5)
    keys, values = P("data"), P("data", None, "heads")
    x = inputs()
    x = {name: x[name][:, :, :1] for name in ("q", "k")} | {name: x[name] for name in ("v", "beta")}
    x["log_decay"] = -jnp.asarray(rng.uniform(0, 0.3, size=(B, T, H, K)))
    x["gram_log_decay"], x["gram_gain"] = (jnp.asarray(s * rng.uniform(size=(B, T, 1))) for s in (-1.0, 1.0))
    specs = dict.fromkeys(x, keys) | dict.fromkeys(("v", "beta", "log_decay"), values)

    def by_chunk(x):
        o, state = ops.pkda(**x, chunk_size=8, implementation="chunk")
        return o, state.recurrent

    mesh = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = jax.shard_map(by_chunk, mesh=mesh, in_specs=(specs,), out_specs=(values, P("data", "heads")))

    def by_scan(x):
        o, state = ops.pkda(**x, implementation="scan")
        return o, state.recurrent

    cotangents = random_like(jax.eval_shape(by_scan, x), seed=1)
    want = jit(value_and_gradient(by_scan))(x, cotangents)
    assert_close(jit(value_and_gradient(sharded))(x, cotangents), want, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap(implementation):
    def one(x):
        out = outputs({name: array[None] for name, array in x.items()}, implementation)
        return jax.tree.map(lambda y: y[0], out)

    value = jit(jax.vmap(one))(inputs())
    assert_close(value, expected()[1], TOLERANCE)


def test_vmap_of_a_gradient_over_one_argument():
    """Unmapped arrays are shared by the batch; the states that the chunks save are not."""
    case = NAMED["delta: scalar decay, write key per key head"]
    x, cotangents = jax.tree.map(jnp.asarray, (case.arrays, case.cotangents))

    def gradient(scale, implementation):
        return value_and_gradient(case.run(implementation))(x | {"v": scale * x["v"]}, cotangents)[1]

    scales = jnp.asarray([-0.5, 1.0, 2.0])
    by_chunk = jit(jax.vmap(functools.partial(gradient, implementation="chunk")))(scales)
    by_scan = jit(functools.partial(gradient, implementation="scan"))
    for i, scale in enumerate(scales):
        assert_close({name: array[i] for name, array in by_chunk.items()}, by_scan(scale), TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_jit(implementation):
    x = {name: array[:1, :5] for name, array in inputs().items() if name in ("q", "k", "v", "beta")}
    run = functools.partial(ops.delta_rule, chunk_size=4, implementation=implementation)
    assert_close(run(**x), jit(lambda x: run(**x))(x), TOLERANCE)


@pytest.mark.parametrize(
    "name", ["delta: channel decays of 0 and -20", "hypergradient: all options", "gram: decays of 0 and -20"]
)
def test_forward_mode_of_the_scan(name):
    case = NAMED[name]
    rng = np.random.default_rng(6)
    directions = {name: rng.normal(size=x.shape) for name, x in case.arrays.items()}
    _, moved = jit(lambda x, directions: jax.jvp(case.run("scan"), (x,), (directions,)))(case.arrays, directions)
    assert_close(moved, oracle.derivative(case.by_oracle, case.arrays, directions), TOLERANCE)
