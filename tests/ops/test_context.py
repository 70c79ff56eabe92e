"""A sequence split over devices has the values and gradients of the whole one, in every operator and rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from support import assert_close, jit, value_and_gradient
from support.cases import CASES, NAMED, TRUST, hypergradient

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

TOLERANCE = 1e-11
# Arrays with a time axis; the others are the same on every device.
TOKENS = {"q", "k", "v", "beta", "write_key", "log_decay", "log_forget", "gain"}


def devices(length):
    """Return the largest number of devices up to 5 that divides the sequence."""
    return max(n for n in range(1, 6) if length % n == 0)


def split(case, implementation="chunk", count=None, **options):
    """Return the case's function with the sequence split over devices."""
    length = case.arrays["k"].shape[1]
    mesh = jax.make_mesh((count or devices(length),), ("context",), axis_types=(AxisType.Auto,))
    ids = () if case.segment_ids is None else (jnp.asarray(case.segment_ids),)
    each, state = case.operator.outputs

    def local(x, *ids):
        more = {"segment_ids": ids[0]} if ids else {}
        return case.run(implementation, context_axis="context", **more, **options)(x)

    def outputs(x):
        specs = {name: P(None, "context") if name in TOKENS else P() for name in x}
        out_specs = {each: P(None, "context"), state: P()}
        in_specs = (specs, *[P(None, "context")] * len(ids))
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(x, *ids)

    return outputs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case):
    got = jit(value_and_gradient(split(case)))(case.arrays, case.cotangents)
    assert_close(got, case.by_scan, TOLERANCE)


@pytest.mark.parametrize("initial", [True, False], ids=["initial state", "from zeros"])
@pytest.mark.parametrize("operator", ["hypergradient", "gram", "squares"])
def test_write_keys_without_tokens(operator, initial):
    case = NAMED[f"{operator}: no tokens"]
    write_key = getattr(ops, f"{operator}_write_key")
    keys = dataclasses.replace(case, operator=dataclasses.replace(case.operator, function=write_key))
    x = {name: a for name, a in case.arrays.items() if initial or name != "initial"}
    got = jit(split(keys))(x)
    assert_close(got, case.by_oracle(**x), TOLERANCE)


# "above" binds at tokens in the middle only, the others from the first token on.
BOUNDS = {"nowhere": (-9.0, 9.0), "below": (0.72, 9.0), "above": (-9.0, 0.95), "both": (0.71, 0.8)}


@pytest.mark.parametrize(
    ("name", "implementation"), [*((name, "chunk") for name in BOUNDS), ("both", "scan")], ids="-".join
)
def test_projection_in_order(name, implementation):
    case = hypergradient(
        name,
        length=48,
        **TRUST | {"bounds": BOUNDS[name], "initial": ("batch", 0.69, 0.71)},
        anchor=0.6,
        batch=1,
        chunk_size=8,
    )
    free = case.by_oracle(**case.arrays)["d"]
    below, above = (bool(np.isclose(free, bound).any()) for bound in BOUNDS[name])
    assert (below, above) == (name in ("below", "both"), name in ("above", "both"))
    got = jit(value_and_gradient(split(case, implementation, count=3)))(case.arrays, case.cotangents)
    assert_close(got, case.by_scan, TOLERANCE)


def test_projection_that_binds_on_one_device_only():
    """The devices run sequentially, also in the other rows of the mesh, where no projection binds."""
    case = hypergradient("one place", length=63, **TRUST | {"bounds": (-9.0, 9.0)}, batch=2)
    x = case.arrays | {"k": case.arrays["k"].copy()}
    x["k"][1, 40] *= 9.0  # one token of one row moves d far outside
    run = functools.partial(ops.hypergradient_preconditioner, eta=0.5, bounds=(-9.0, 9.0), chunk_size=8)
    mesh = jax.make_mesh((2, 3), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    specs = {name: P("data", "context") if name in TOKENS else P("data") for name in x}

    def local(x):
        return run(**x, context_axis="context", implementation="chunk")

    out_specs = (P("data", "context"), P("data"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    whole = lambda x: run(**x, implementation="scan")
    used = whole(jax.tree.map(jnp.asarray, x))[0]
    assert np.isclose(np.abs(used[1, 41:44]), 9.0).any()
    assert not np.isclose(np.abs(used[0]), 9.0).any()
    cotangents = (jnp.asarray(np.random.default_rng(0).normal(size=used.shape)), jnp.ones((2, 3, 8)))
    want = jit(value_and_gradient(whole))(x, cotangents)
    assert_close(jit(value_and_gradient(sharded))(x, cotangents), want, TOLERANCE)


def test_bfloat16():
    case = NAMED["delta: channel decay, write key per value head"]
    with jax.enable_x64(False):
        x = {name: jnp.asarray(a, jnp.bfloat16 if a.ndim == 4 else jnp.float32) for name, a in case.arrays.items()}
        x["log_decay"], x["initial_state"] = (
            jnp.asarray(case.arrays[n], jnp.float32) for n in ("log_decay", "initial_state")
        )
        got = jit(split(case, None))(x)
    assert got["o"].dtype == jnp.bfloat16
    assert_close(got, case.expected, 1e-2)


def test_errors(our_checks):
    x = {name: jnp.asarray(a[:, :4]) for name, a in NAMED["delta: no options"].arrays.items()}
    with pytest.raises(ValueError, match=r"context_axis: got 'context', expected a mesh axis"):
        ops.delta_rule(**x, context_axis="context")
    with pytest.raises(ValueError, match="context_axis: got 'rows'"):
        ops.hypergradient_preconditioner(x["k"], eta=1.0, context_axis="rows")
    with pytest.raises(ValueError, match="context_axis: got 'rows'"):
        ops.gram_preconditioner(x["k"], x["beta"], x["beta"], center=0.0, context_axis="rows")
    with pytest.raises(TypeError, match="context_axis: got 3, expected the name"):
        ops.delta_rule(**x, context_axis=3)
    with pytest.raises(ValueError, match="context_axis: got a name, expected None"):
        ops.exact_pdn(x["q"], x["k"], x["v"], context_axis="context")
