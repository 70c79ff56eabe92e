"""The kernels of the delta rule in Mosaic GPU's interpreter, against the scan in float32 on the same rounded inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from osdn_jax.ops import mosaic_gpu, selection
from osdn_jax.ops.delta_rule_operator import IMPLEMENTATIONS
from pallas_kernels import delta_rule as kernels
from pallas_kernels.delta_rule.split_sequence import split_count
from support import assert_close, random_like, value_and_gradient
from support.cases import RESETS, delta, growth, strong_decay, unit
from support.interpreter import assert_no_races

KERNEL = "mosaic_gpu_interpret"
SIXTEEN_BITS = ("q", "k", "v", "write_key")
GATES = ("beta", "log_decay")


def kernel_case(name, *, key_heads=1, heads=1, key_dim=64, value_dim=64, **more):
    return delta(name, batch=1, key_heads=key_heads, heads=heads, key_dim=key_dim, value_dim=value_dim, **more)


def near_parallel(x, rng):
    x["k"] = unit(rng.normal(size=x["k"].shape[-1]) + 0.01 * rng.normal(size=x["k"].shape))
    x["beta"] = np.full(x["beta"].shape, 0.95)


def some_zero_betas(x, rng):
    x["beta"] = np.where(rng.uniform(size=x["beta"].shape) < 0.3, 0.0, x["beta"])


CASES = [
    kernel_case("nothing", length=0, decay="scalar", packed=True),
    kernel_case("one token", length=1, decay="channel", write_key="value"),
    kernel_case("bare", length=63, initial=False),
    kernel_case("write key per value head", length=200, heads=2, write_key="value", packed=True),
    kernel_case("scalar decay", length=64, decay="scalar"),
    kernel_case("shared keys, scale", length=65, heads=2, decay="scalar", write_key="key", packed=True, scale=0.7),
    kernel_case("scalar growth", length=57, decay="scalar", change=growth),
    kernel_case("scalar decays of 0 and -20", length=57, decay="scalar", packed=True, change=strong_decay),
    kernel_case("channel decay", length=57, decay="channel"),
    kernel_case("channel decay, shared keys", length=100, heads=2, decay="channel", write_key="key", packed=True),
    kernel_case("channel decays of 0 and -20", length=65, decay="channel", write_key="key", change=strong_decay),
    kernel_case("no erase", length=64, erase=False),
    kernel_case("no erase, scalar decay", length=70, heads=2, decay="scalar", erase=False, packed=True),
    kernel_case("no erase, channel decay, write key", length=57, decay="channel", write_key="key", erase=False),
    kernel_case("strengths of zero", length=64, decay="scalar", change=some_zero_betas),
    kernel_case("K 128, V 128", length=70, decay="scalar", key_dim=128, value_dim=128),
    kernel_case("K 256, V 64", length=57, decay="scalar", key_dim=256),
    kernel_case("K 64, V 256", length=57, write_key="key", value_dim=256),
    kernel_case("K 128, channel decay", length=57, decay="channel", key_dim=128),
]  # fmt: skip


def rounded(arrays, dtype=jnp.bfloat16):
    return {name: jnp.asarray(x, dtype if name in SIXTEEN_BITS else jnp.float32) for name, x in arrays.items()}


def floats(x):
    return jax.tree.map(lambda array: array.astype(jnp.float32), x)


def by_scan(case, x, cotangents):
    """Return values and gradients of the reference scan, in float32."""
    run = case.run("scan")
    return jax.jit(value_and_gradient(run))(floats(x), floats(cotangents))


def by_kernel(case, x, cotangents, *, chunk_size=None):
    with assert_no_races():
        return value_and_gradient(case.run(KERNEL, chunk_size=chunk_size))(x, cotangents)


def cotangents_of(case, x):
    return random_like(jax.eval_shape(case.run("scan"), x), seed=1)


def check(case, dtype, tolerance, gates_tolerance):
    x = rounded(case.arrays, dtype)
    cotangents = cotangents_of(case, x)
    value, gradient = by_kernel(case, x, cotangents)
    want_value, want_gradient = by_scan(case, x, cotangents)
    assert value["o"].dtype == dtype
    assert value["state"].dtype == jnp.float32
    assert_close(value, want_value, tolerance)
    keys, gates = ({n: g for n, g in gradient.items() if (n in GATES) is kind} for kind in (False, True))
    assert {name: g.dtype for name, g in gradient.items()} == {name: array.dtype for name, array in x.items()}
    assert_close(keys, {name: want_gradient[name] for name in keys}, tolerance)
    assert_close(gates, {name: want_gradient[name] for name in gates}, gates_tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_the_scans(case):
    check(case, jnp.bfloat16, 1e-2, 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("kind", RESETS)
def test_resets(kind, decay):
    """They leave no error in their neighbours, and get no gradient."""
    case = kernel_case(kind, length=130, decay=decay, change=RESETS[kind])
    x = rounded(case.arrays)
    cotangents = cotangents_of(case, x)
    value, gradient = by_kernel(case, x, cotangents)
    want_value, want_gradient = by_scan(case, x, cotangents)
    assert np.all(np.asarray(gradient["log_decay"])[case.arrays["log_decay"] < -1000] == 0)
    assert_close((value, gradient), (want_value, want_gradient), 6e-3)


def test_a_nan_log_decay_makes_later_outputs_nan():
    x = arguments(log_decay=jnp.zeros((1, 8, 1)).at[0, 3].set(jnp.nan))
    o, state = ops.delta_rule(**x, implementation=KERNEL)
    assert np.isnan(np.asarray(o[0, 3:], np.float32)).all()
    assert np.isnan(state).all()


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, "channel"])
def test_float16(decay):
    check(kernel_case("float16", length=70, decay=decay, write_key="key"), jnp.float16, 2e-3, 4e-3)


@pytest.mark.slow
@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_near_parallel_keys(decay):
    """With a cotangent of the final state, gradients of gates are small differences of large terms."""
    check(kernel_case("near-parallel", length=193, decay=decay, change=near_parallel), jnp.bfloat16, 1e-2, 1e-2)


@pytest.mark.slow
def test_near_parallel_keys_without_a_cotangent_of_the_state():
    """With one, the last beta has nearly all of the norm, and its gradient is a small difference itself."""
    case = kernel_case("near-parallel", length=193, initial=False, change=near_parallel)
    x = rounded(case.arrays)
    cotangents = cotangents_of(case, x)
    cotangents["state"] = jnp.zeros_like(cotangents["state"])
    _, gradient = by_kernel(case, x, cotangents)
    assert_close(gradient, by_scan(case, x, cotangents)[1], 1e-2)


@pytest.mark.parametrize("shape", [(0, 3, 1), (2, 0, 1), (2, 3, 0)], ids=["batch", "tokens", "heads"])
def test_empty_arrays(shape):
    """Values and gradients are empty too, with the right shapes and types."""
    state = jnp.ones((shape[0], shape[2], 64, 64))
    keys, rows, resets = jnp.zeros((*shape, 64), jnp.bfloat16), jnp.zeros(shape), jnp.zeros(shape[:2], bool)
    x = dict.fromkeys("qkv", keys) | {"beta": rows, "log_decay": rows, "initial_state": state}
    (o, memory), pull = jax.vjp(lambda x: kernels.delta_rule(**x, resets=resets, scale=1.0, interpret=True), x)
    assert (o.shape, o.dtype) == (keys.shape, jnp.bfloat16)
    np.testing.assert_array_equal(memory, state)
    (gradient,) = pull((o, memory))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), gradient) == jax.tree.map(lambda a: (a.shape, a.dtype), x)
    np.testing.assert_array_equal(gradient["initial_state"], memory)


def test_vmap_over_an_empty_axis():
    x, _ = of_two(heads=1)
    out = jax.vmap(program)(jax.tree.map(lambda a: jnp.zeros((0, *a.shape), a.dtype), x))
    assert {name: a.shape for name, a in out.items()} == {
        "o": (0, *x["v"].shape),
        "state": (0, *x["initial_state"].shape),
    }


def test_two_calls_with_a_carried_state_equal_one():
    case = kernel_case("carried", length=150, decay="scalar", write_key="key")
    x = rounded(case.arrays)
    whole = ops.delta_rule(**x, implementation=KERNEL)
    state = x.pop("initial_state")
    first = {name: array[:, :70] for name, array in x.items()}
    second = {name: array[:, 70:] for name, array in x.items()}
    start, state = ops.delta_rule(**first, initial_state=state, implementation=KERNEL)
    end, state = ops.delta_rule(**second, initial_state=state, implementation=KERNEL)
    assert_close((jnp.concatenate([start, end], axis=1), state), whole, 5e-3)


def test_shared_key_heads_equal_repeated_ones():
    case = kernel_case("shared", length=70, heads=2, decay="scalar", write_key="key")
    x = rounded(case.arrays)
    repeated = x | {name: jnp.repeat(x[name], 2, axis=2) for name in ("q", "k", "write_key")}
    shared = ops.delta_rule(**x, implementation=KERNEL)
    jax.tree.map(np.testing.assert_array_equal, ops.delta_rule(**repeated, implementation=KERNEL), shared)


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "batch", "length"), [("scalar", 2, 130), ("channel", 1, 70)])
def test_splits_that_run_in_parallel_equal_the_whole_sequence(decay, batch, length):
    case = delta("pieces", length=length, batch=batch, key_heads=1, heads=1, key_dim=64, value_dim=64, decay=decay)
    x, resets = rounded(case.arrays), jnp.zeros((batch, length), bool).at[0, length - 5].set(True)

    def in_splits(x):
        o, state = kernels.delta_rule(**x, scale=0.125, resets=resets, splits=2, interpret=True)
        return {"o": o, "state": state}

    def by_scan(x):
        segment_ids = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
        o, state = ops.delta_rule(**x, segment_ids=segment_ids, implementation="scan")
        return {"o": o, "state": state}

    cotangents = cotangents_of(case, x)
    with assert_no_races():
        got = value_and_gradient(in_splits)(x, cotangents)
    assert_close(got, jax.jit(value_and_gradient(by_scan))(floats(x), floats(cotangents)), 5e-3)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((1, 64, 128, 128, 128), 1),  # 128 blocks without splits
        ((1, 8, 512, 128, 128), 8),
        ((1, 1, 8192, 128, 64), 128),
        ((1, 8, 100, 128, 128), 4),  # splits of at least 16 chunks
        ((1, 8, 60, 128, 128), 1),  # two splits would cost more than they gain
        ((16, 8, 32, 128, 128), 1),
    ],
)
def test_split_count(shape, count):
    assert split_count(*shape) == count


def program(x):
    o, state = ops.delta_rule(**x, implementation=KERNEL)
    return {"o": o, "state": state}


def of_two(heads):
    """Return inputs with a batch of two, and cotangents."""
    case = delta("batch", length=65, batch=2, key_heads=heads, heads=heads, key_dim=64, value_dim=64, decay="scalar")
    x = rounded(case.arrays)
    return x, random_like(jax.eval_shape(program, x), seed=1)


@functools.cache
def transformed():
    """Return inputs, cotangents, and the kernels' values and gradients without a transformation."""
    x, cotangents = of_two(heads=1)
    return x, cotangents, value_and_gradient(program)(x, cotangents)


@pytest.mark.slow
def test_jit():
    x, cotangents, want = transformed()
    assert_close(jax.jit(value_and_gradient(program))(x, cotangents), floats(want), 1e-3)


@pytest.mark.slow
def test_remat(monkeypatch):
    """Trace for a GPU: the interpreter's callbacks cannot be rematerialised."""
    monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: True)
    x, cotangents, want = transformed()

    @jax.checkpoint
    def for_a_gpu(x):
        o, state = ops.delta_rule(**x, implementation="mosaic_gpu")
        return {"o": o, "state": state}

    got = jax.eval_shape(value_and_gradient(for_a_gpu), x, cotangents)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(lambda a: (a.shape, a.dtype), want)


@pytest.mark.slow
def test_vmap():
    x, cotangents, want = transformed()
    x, cotangents = jax.tree.map(lambda array: array[:, None], (x, cotangents))
    got = jax.vmap(value_and_gradient(program))(x, cotangents)
    assert_close(jax.tree.map(lambda array: array[:, 0], got), floats(want), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_shard_map(devices):
    """Check values on one device, because the interpreter treats several as one; types on four."""
    side = int(devices**0.5)
    mesh = jax.make_mesh((side, side), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    token, state = P("data", None, "heads"), P("data", "heads")
    specs = dict.fromkeys(("q", "k", "v", "beta", "log_decay"), token) | {"initial_state": state}
    sharded = jax.shard_map(program, mesh=mesh, in_specs=(specs,), out_specs={"o": token, "state": state})
    run = value_and_gradient(sharded)
    if devices == 1:
        x, cotangents, want = transformed()
        assert_close(jax.jit(run)(x, cotangents), floats(want), 1e-3)
    else:
        x, cotangents = of_two(heads=2)
        got = jax.eval_shape(run, x, cotangents)
        want = jax.eval_shape(value_and_gradient(program), x, cotangents)
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)


def arguments(**changes):
    x = {
        "q": jnp.full((1, 8, 1, 64), 0.1, jnp.bfloat16),
        "k": jnp.full((1, 8, 1, 64), 0.1, jnp.bfloat16),
        "v": jnp.full((1, 8, 1, 64), 0.1, jnp.bfloat16),
        "beta": jnp.ones((1, 8, 1)),
    }
    return x | changes


LIMITS = {
    "float32": (
        dict.fromkeys("qkv", jnp.full((1, 8, 1, 64), 0.1)),
        "q: got float32, the kernels take bfloat16 or float16",
    ),
    "types": ({"v": jnp.full((1, 8, 1, 64), 0.1, jnp.float16)}, "v: got float16 beside a q of bfloat16"),
    "keys": (dict.fromkeys("qk", jnp.full((1, 8, 1, 96), 0.1, jnp.bfloat16)), "q: got a head dimension of 96"),
    "values": ({"v": jnp.ones((1, 8, 1, 32), jnp.bfloat16)}, "v: got a head dimension of 32"),
    "chunks": ({"chunk_size": 32}, "chunk_size: got 32, the kernels work in chunks of 64"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_unsupported_arguments(limit, monkeypatch):
    """Named, the kernels say why they refuse; unnamed, another implementation runs."""
    changes, message = LIMITS[limit]
    x = arguments(**changes)
    with pytest.raises(NotImplementedError, match=f"implementation '{KERNEL}': {message}"):
        ops.delta_rule(**x, implementation=KERNEL)
    want = ops.delta_rule(**x, implementation="scan")
    monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: True)
    monkeypatch.setattr(selection, "MOSAIC_GPU_MEASURED", True)
    assert_close(ops.delta_rule(**x), floats(want), 1e-2)


def test_without_a_hopper_gpu():
    with pytest.raises(NotImplementedError, match="'mosaic_gpu': got a cpu, the kernels need a GPU of compute capab"):
        ops.delta_rule(**arguments(), implementation="mosaic_gpu")


@pytest.mark.parametrize("measured", [False, True])
def test_hopper_chooses_the_kernels_once_they_are_measured(measured, monkeypatch):
    length = 6 + measured  # distinct: equal calls are compiled once, whatever is patched in between
    x = {name: array[:, :length] for name, array in arguments().items()}
    want = ops.delta_rule(**x, implementation="scan")
    monkeypatch.setattr(mosaic_gpu, "on_hopper", lambda: True)
    monkeypatch.setattr(selection, "MOSAIC_GPU_MEASURED", measured)
    interpreted = functools.partial(mosaic_gpu.delta_rule, interpret=True)
    calls = []
    entry = IMPLEMENTATIONS["mosaic_gpu"]._replace(run=lambda *call: calls.append(1) or interpreted(*call))
    monkeypatch.setitem(IMPLEMENTATIONS, "mosaic_gpu", entry)
    assert_close(ops.delta_rule(**x), floats(want), 1e-2)
    assert bool(calls) is measured


def test_no_gpu_has_measured_the_kernels():
    assert selection.MOSAIC_GPU_MEASURED is False
