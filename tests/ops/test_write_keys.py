"""Write keys equal the preconditioner times the keys, in values and gradients, under every transformation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from support import assert_close, jit, random_like, value_and_gradient
from support.cases import ids

pytestmark = pytest.mark.usefixtures("float64")

B, T, H, K = 2, 24, 2, 4
SEGMENTS = jnp.asarray(ids(((5, 6, 16), (1, 12)), B, T))
HYPERGRADIENT = {"eta": 0.5, "bounds": (0.9, 1.05), "restart": 1.0, "anchor": 0.97}  # the projection binds
OPERATORS = {
    "hypergradient": (
        functools.partial(ops.hypergradient_write_key, **HYPERGRADIENT),
        functools.partial(ops.hypergradient_preconditioner, **HYPERGRADIENT),
    ),
    "gram": (
        functools.partial(ops.gram_write_key, center=-0.2),
        functools.partial(ops.gram_preconditioner, center=-0.2),
    ),
    "squares": (
        functools.partial(ops.squares_write_key, restart=1.0),
        functools.partial(ops.squares_preconditioner, restart=1.0),
    ),
}


def arrays(operator):
    rng = np.random.default_rng(0)
    gates = {"hypergradient": ("beta", "log_forget"), "gram": ("gain", "log_decay")}.get(operator, ())
    x = {name: rng.uniform(0.1, 0.9, size=(B, T, H)) for name in gates}
    x = {name: -0.1 * array if name.startswith("log") else array for name, array in x.items()}
    x |= {"k": rng.normal(size=(B, T, H, K)) / 2, "initial": rng.uniform(0.9, 1.05, size=(B, H, K))}
    return jax.tree.map(jnp.asarray, x)


@functools.cache
def expected(operator):
    """Return (cotangents, values and gradients of the product, by the scan)."""
    _, preconditioner = OPERATORS[operator]

    def product(x):
        multiplier, final = preconditioner(**x, segment_ids=SEGMENTS, implementation="scan")
        return {"write_key": multiplier * x["k"], "final": final}

    x = arrays(operator)
    cotangents = random_like(jax.eval_shape(product, x), seed=1)
    return cotangents, jit(value_and_gradient(product))(x, cotangents)


def by_rows(run):
    """Return run under vmap over the rows of the batch."""

    def vmapped(x, segments):
        rows = jax.tree.map(lambda y: y[:, None], (x, segments))
        return jax.tree.map(lambda y: y[:, 0], jax.vmap(run)(*rows))

    return vmapped


def over_devices(run):
    """Return run with the sequence split over two devices."""
    mesh = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,))
    tokens = P(None, "context")

    def split(x, segments):
        specs = {name: P() if name == "initial" else tokens for name in x}
        local = functools.partial(run, context_axis="context")
        return jax.shard_map(local, mesh=mesh, in_specs=(specs, tokens), out_specs=(tokens, P()))(x, segments)

    return split


TRANSFORMATIONS = {"vmap": by_rows, "remat": jax.checkpoint, "context_axis": over_devices}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", "chunk"])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_write_keys(operator, transformation, implementation):
    write_key, _ = OPERATORS[operator]

    def run(x, segments, **options):
        return write_key(**x, segment_ids=segments, chunk_size=8, implementation=implementation, **options)

    def outputs(x):
        return dict(zip(("write_key", "final"), TRANSFORMATIONS[transformation](run)(x, SEGMENTS), strict=True))

    cotangents, want = expected(operator)
    assert_close(jit(value_and_gradient(outputs))(arrays(operator), cotangents), want, 1e-11)


def test_projection_binds():
    """Otherwise the tests above would cover the affine form alone."""
    d, _ = OPERATORS["hypergradient"][1](**arrays("hypergradient"), segment_ids=SEGMENTS, implementation="scan")
    bound = np.isin(d[:, 1:], HYPERGRADIENT["bounds"])
    assert 0.05 < bound.mean() < 0.95
