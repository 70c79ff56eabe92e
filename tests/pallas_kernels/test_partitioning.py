"""Each device runs its own shard of batch and heads under jit: a stand-in for kernels, on the devices of a CPU.

`python -m pallas_kernels.aot` checks that the programs of the kernels themselves, for two GPUs, gather nothing.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.common.partitioning import Heads, per_shard

B, T, K = 4, 6, 3
AXES, RESULTS = ("b.k.", "b.h.", "h", "b."), ("b.h.", "bh.")
MOVES = re.compile(r"(all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(")


def stand_in(arrays, scale):
    """Use key head h // group for value head h, and all tokens, like a kernel."""
    q, v, gain, resets = arrays
    group = v.shape[2] // q.shape[2]
    sums = jnp.cumsum(jnp.where(resets[..., None, None], 0.0, v), axis=1) * gain[None, None, :, None]
    out = scale * sums * jnp.repeat(q, group, axis=2)
    return [out, jnp.max(out, axis=1)]


def split(arrays):
    heads = Heads(arrays[0].shape[2], arrays[1].shape[2] // arrays[0].shape[2])
    return per_shard(stand_in, arrays, AXES, RESULTS, 0.5, heads=heads, interpret=False)


def inputs(key_heads, heads):
    rng = np.random.default_rng(0)
    floats = [rng.normal(size=size).astype(np.float32) for size in ((B, T, key_heads, K), (B, T, heads, K), (heads,))]
    return (*floats, rng.uniform(size=(B, T)) < 0.3)


def mesh_of(*sizes):
    return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def place(mesh, arrays, *specs):
    return tuple(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True))


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


BATCH, HEADS = (P("x"), P("x"), P(), P("x")), (P(None, None, "x"), P(None, None, "x"), P("x"), P())
CASES = {
    "batch": ((4,), 2, 4, BATCH),
    "heads": ((2,), 2, 2, HEADS),
    "grouped heads": ((2,), 2, 8, HEADS),
    "batch and heads": ((2, 2), 2, 4, (P("x", None, "y"), P("x", None, "y"), P("y"), P("x"))),
    "more devices than key heads": ((4,), 2, 8, (P(), P(None, None, "x"), P("x"), P())),
    "two axes, more devices than key heads": ((2, 4), 2, 8, (P(), P(None, None, ("x", "y")), P(("x", "y")), P())),
    "one key head": ((4,), 1, 8, (P(), P(None, None, "x"), P("x"), P())),
    "only the values": ((4,), 4, 4, (P(), P("x"), P(), P())),
}


@pytest.mark.parametrize("case", CASES)
def test_each_device_runs_its_shard(case):
    sizes, key_heads, heads, specs = CASES[case]
    mesh, arrays = mesh_of(*sizes), inputs(key_heads, heads)
    placed = place(mesh, arrays, *specs)
    compiled = jax.jit(split).lower(placed).compile()
    assert MOVES.findall(compiled.as_text()) == []
    got = compiled(placed)
    assert_same(got, stand_in(arrays, 0.5))
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, specs[1]), 4)
    assert_same(split(placed), got)  # not compiled by the caller


@pytest.mark.parametrize("spec", [P(None, "x"), P(None, None, None, "x")], ids=["tokens", "channels"])
def test_axes_that_a_kernel_needs_unsharded_are_gathered(spec):
    arrays = inputs(3, 3)
    placed = place(mesh_of(3), arrays, spec, spec, P(), P())
    assert_same(jax.jit(split)(placed), stand_in(arrays, 0.5))


def test_shards_with_parts_of_two_groups_are_gathered():
    arrays = inputs(2, 6)
    placed = place(mesh_of(3), arrays, P(), P(None, None, "x"), P("x"), P())
    assert_same(jax.jit(split)(placed), stand_in(arrays, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(None, None, None, "x")])
def test_vmap(spec):
    """Shard along the mapped axis, the batch or the heads; one array is not mapped."""
    mesh, arrays = mesh_of(2), inputs(2, 4)
    mapped = (*(jnp.stack([x, 2 * x]) for x in arrays[:2]), *arrays[2:])
    want = jax.vmap(lambda q, v: stand_in((q, v, *arrays[2:]), 0.5))(*mapped[:2])
    placed = place(mesh, mapped, spec, spec, P(), P())
    run = jax.jit(lambda q, v, gain, resets: jax.vmap(lambda q, v: split((q, v, gain, resets)))(q, v))
    compiled = run.lower(*placed).compile()
    assert MOVES.findall(compiled.as_text()) == []
    assert_same(compiled(*placed), want)


def test_twice_mapped():
    arrays = inputs(1, 2)
    twice = jax.tree.map(lambda x: jnp.stack([jnp.stack([x, x])] * 3), arrays)
    got = jax.jit(jax.vmap(jax.vmap(split)))(place(mesh_of(2), twice, *[P(None, "x")] * 4))
    assert_same(jax.tree.map(lambda x: x[2, 1], got), stand_in(arrays, 0.5))


@pytest.mark.parametrize("specs", [BATCH, (P("x", None, "y"), P("x", None, "y"), P("y"), P("x"))])
def test_under_auto_axes_of_an_explicit_mesh(specs):
    mesh, arrays = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2), inputs(2, 4)
    with jax.set_mesh(mesh):
        out = [specs[1], P(*(entry for entry in (*specs[1], None, None, None)[:3:2]))]
        got = jax.jit(jax.sharding.auto_axes(split, out_sharding=out))(place(mesh, arrays, *specs))
    assert_same(got, stand_in(arrays, 0.5))
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, specs[1]), 4)


def inside(sizes, names):
    specs, out = (P("x"), P("x"), P(), P("x")), [P("x"), P("x")]
    return jax.jit(jax.shard_map(split, mesh=mesh_of(*sizes), in_specs=(specs,), out_specs=out, axis_names=names))


@pytest.mark.parametrize(("sizes", "names"), [((2, 2), {"x", "y"}), ((4, 1), {"x"})])
def test_inside_shard_map(sizes, names):
    arrays = inputs(2, 4)
    assert_same(inside(sizes, names)(arrays), stand_in(arrays, 0.5))


def test_a_shard_map_over_some_axes_only_is_refused():
    message = "jax.shard_map: got one over x, with y left to jit, the kernels need all or none"
    with pytest.raises(NotImplementedError, match=message):
        inside((2, 2), {"x"})(inputs(2, 4))


def test_one_device_adds_nothing():
    arrays = inputs(2, 4)
    plain = jax.jit(functools.partial(stand_in, scale=0.5)).lower(arrays).compile().cost_analysis()
    ours = jax.jit(split).lower(arrays)
    assert "CustomSPMDPartitioning" not in ours.as_text()
    assert ours.compile().cost_analysis() == plain


def test_equal_calls_compile_once(caplog):
    arrays = inputs(2, 4)
    split(arrays)
    with jax.log_compiles():
        split(tuple(x[::-1] for x in arrays))
    assert "Compiling" not in caplog.text
    with jax.log_compiles():
        split(tuple(x[:, :2] for x in arrays[:2]) + (arrays[2], arrays[3][:, :2]))
    assert "Compiling" in caplog.text
