"""The kernels of the delta rule in Triton's interpreter, against the scan in float32 on the same rounded inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from support import assert_close, random_like, value_and_gradient
from support.cases import RESETS, delta, growth, strong_decay, unit

kernels = pytest.importorskip("triton_kernels.delta_rule")

from triton_kernels.common.target import INTERPRETER, Target  # noqa: E402
from triton_kernels.delta_rule.scan import scan_settings  # noqa: E402
from triton_kernels.delta_rule.split_sequence import split_count  # noqa: E402

KERNEL = "triton_interpret"
SIXTEEN_BITS = ("q", "k", "v", "write_key")
GATES = ("beta", "log_decay")
# Of keys and values, and of gates, whose gradients are small differences of large terms.
TOLERANCES = {jnp.float32: (1e-5, 1e-5), jnp.bfloat16: (1e-2, 2e-2), jnp.float16: (1e-2, 2e-2)}
TYPES = tuple(TOLERANCES)


def kernel_case(name, *, key_heads=1, heads=1, key_dim=32, value_dim=32, **more):
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
    kernel_case("channel decay", length=65, decay="channel"),
    kernel_case("channel growth", length=57, decay="channel", change=growth),
    kernel_case("channel decay, shared keys", length=66, heads=2, decay="channel", write_key="key", packed=True),
    kernel_case("channel decays of 0 and -20", length=65, decay="channel", write_key="key", change=strong_decay),
    kernel_case("no erase", length=64, erase=False),
    kernel_case("no erase, scalar decay", length=70, heads=2, decay="scalar", erase=False, packed=True),
    kernel_case("no erase, channel decay, write key", length=57, decay="channel", write_key="key", erase=False),
    kernel_case("strengths of zero", length=64, decay="scalar", change=some_zero_betas),
    kernel_case("K 64, V 128", length=70, decay="scalar", key_dim=64, value_dim=128),
    kernel_case("K 128, channel decay", length=35, decay="channel", key_dim=128),
    kernel_case("K 256", length=57, decay="scalar", key_dim=256),
    kernel_case("V 256", length=57, write_key="key", value_dim=256),
]  # fmt: skip


def rounded(arrays, dtype):
    return {name: jnp.asarray(x, dtype if name in SIXTEEN_BITS else jnp.float32) for name, x in arrays.items()}


def floats(x):
    return jax.tree.map(lambda array: array.astype(jnp.float32), x)


def cotangents_of(case, x):
    return random_like(jax.eval_shape(case.run("scan"), x), seed=1)


def by_scan(case, x, cotangents):
    """Return values and gradients of the reference scan, in float32."""
    return jax.jit(value_and_gradient(case.run("scan")))(floats(x), floats(cotangents))


def by_kernel(case, x, cotangents):
    return jax.jit(value_and_gradient(case.run(KERNEL, chunk_size=None)))(x, cotangents)


def check(case, dtype, tolerance, gates_tolerance):
    x = rounded(case.arrays, dtype)
    cotangents = cotangents_of(case, x)
    value, gradient = by_kernel(case, x, cotangents)
    want_value, want_gradient = by_scan(case, x, cotangents)
    assert value["o"].dtype == dtype
    assert value["state"].dtype == jnp.float32
    assert_close(value, want_value, tolerance)
    assert {name: g.dtype for name, g in gradient.items()} == {name: array.dtype for name, array in x.items()}
    for name, g in gradient.items():
        assert_close({name: g}, {name: want_gradient[name]}, gates_tolerance if name in GATES else tolerance)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_the_scans(case, dtype):
    check(case, dtype, *TOLERANCES[dtype])


@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_float16(decay):
    check(kernel_case("float16", length=70, decay=decay, write_key="key"), jnp.float16, 2e-3, 4e-3)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("decay", [None, "scalar", "channel"])
def test_near_parallel_keys(decay, dtype):
    """With a cotangent of the final state, gradients of gates are small differences of large terms."""
    check(kernel_case("near-parallel", length=193, decay=decay, change=near_parallel), dtype, *TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TYPES[:2], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("kind", RESETS)
def test_resets(kind, decay, dtype):
    """They leave no error in their neighbours, and get no gradient."""
    case = kernel_case(kind, length=130, decay=decay, change=RESETS[kind])
    x = rounded(case.arrays, dtype)
    cotangents = cotangents_of(case, x)
    value, gradient = by_kernel(case, x, cotangents)
    assert np.all(np.asarray(gradient["log_decay"])[case.arrays["log_decay"] < -1000] == 0)
    assert_close((value, gradient), by_scan(case, x, cotangents), 1e-5 if dtype == jnp.float32 else 6e-3)


def test_a_nan_log_decay_makes_later_outputs_nan():
    x = arguments(log_decay=jnp.zeros((1, 8, 1)).at[0, 3].set(jnp.nan))
    o, state = ops.delta_rule(**x, implementation=KERNEL)
    assert np.isnan(np.asarray(o[0, 3:], np.float32)).all()
    assert np.isnan(state).all()


@pytest.mark.parametrize("decay", ["scalar", "channel"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_segment_that_is_not_finite_stays_alone(poison, decay):
    case = kernel_case("documents", length=70, decay=decay)
    x = rounded(case.arrays, jnp.bfloat16)
    x["v"] = x["v"].at[0, 30].set(poison)
    ids = jnp.asarray((np.arange(70) >= 20).astype(int) + (np.arange(70) >= 41))[None]

    def loss(x, implementation):
        o, state = ops.delta_rule(**x, segment_ids=ids, implementation=implementation)
        return jnp.sum(jnp.where((ids == 1)[..., None, None], 0.0, o.astype(jnp.float32))) + jnp.sum(state)

    value, gradient = jax.value_and_grad(loss)(x, KERNEL)
    want_value, want_gradient = jax.value_and_grad(loss)(floats(x), "scan")
    assert np.isfinite(value)
    assert_close(value, want_value, 1e-2)
    outside = jax.tree.map(lambda g: g[:, np.r_[0:20, 41:70]] if g.ndim > 2 and g.shape[1] == 70 else g, gradient)
    want = jax.tree.map(lambda g: g[:, np.r_[0:20, 41:70]] if g.ndim > 2 and g.shape[1] == 70 else g, want_gradient)
    assert_close(outside, want, 2e-2)


@pytest.mark.parametrize("shape", [(0, 3, 1), (2, 0, 1), (2, 3, 0)], ids=["batch", "tokens", "heads"])
def test_empty_arrays(shape):
    """Values and gradients are empty too, with the right shapes and types."""
    state = jnp.ones((shape[0], shape[2], 64, 64))
    keys, rows, resets = jnp.zeros((*shape, 64), jnp.bfloat16), jnp.zeros(shape), jnp.zeros(shape[:2], bool)
    x = dict.fromkeys("qkv", keys) | {"beta": rows, "log_decay": rows, "initial_state": state}
    (o, memory), pull = jax.vjp(lambda x: kernels.delta_rule(**x, resets=resets, scale=1.0, target=INTERPRETER), x)
    assert (o.shape, o.dtype) == (keys.shape, jnp.bfloat16)
    np.testing.assert_array_equal(memory, state)
    (gradient,) = pull((o, memory))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), gradient) == jax.tree.map(lambda a: (a.shape, a.dtype), x)
    np.testing.assert_array_equal(gradient["initial_state"], memory)


def test_vmap_over_an_empty_axis():
    x, _ = of_two(heads=1)
    out = jax.vmap(program)(jax.tree.map(lambda a: jnp.zeros((0, *a.shape), a.dtype), x))
    shapes = {"o": (0, *x["v"].shape), "state": (0, *x["initial_state"].shape)}
    assert {name: a.shape for name, a in out.items()} == shapes


def test_two_calls_with_a_carried_state_equal_one():
    x = rounded(kernel_case("carried", length=150, decay="scalar", write_key="key").arrays, jnp.float32)
    whole = ops.delta_rule(**x, implementation=KERNEL)
    state = x.pop("initial_state")
    first = {name: array[:, :70] for name, array in x.items()}
    second = {name: array[:, 70:] for name, array in x.items()}
    start, state = ops.delta_rule(**first, initial_state=state, implementation=KERNEL)
    end, state = ops.delta_rule(**second, initial_state=state, implementation=KERNEL)
    assert_close((jnp.concatenate([start, end], axis=1), state), whole, 1e-5)


def test_shared_key_heads_equal_repeated_ones():
    x = rounded(kernel_case("shared", length=70, heads=2, decay="scalar", write_key="key").arrays, jnp.bfloat16)
    repeated = x | {name: jnp.repeat(x[name], 2, axis=2) for name in ("q", "k", "write_key")}
    shared = ops.delta_rule(**x, implementation=KERNEL)
    jax.tree.map(np.testing.assert_array_equal, ops.delta_rule(**repeated, implementation=KERNEL), shared)


@pytest.mark.parametrize(("decay", "batch", "length"), [("scalar", 2, 130), ("channel", 1, 70)])
def test_splits_that_run_in_parallel_equal_the_whole_sequence(decay, batch, length):
    case = delta("splits", length=length, batch=batch, key_heads=1, heads=1, key_dim=32, value_dim=32, decay=decay)
    x, resets = rounded(case.arrays, jnp.float32), jnp.zeros((batch, length), bool).at[0, length - 5].set(True)

    def in_splits(x):
        o, state = kernels.delta_rule(**x, scale=0.125, resets=resets, splits=2, target=INTERPRETER)
        return {"o": o, "state": state}

    def whole(x):
        segment_ids = jnp.cumsum(resets, axis=1, dtype=jnp.int32)
        o, state = ops.delta_rule(**x, segment_ids=segment_ids, scale=0.125, implementation="scan")
        return {"o": o, "state": state}

    cotangents = random_like(jax.eval_shape(whole, x), seed=1)
    got = value_and_gradient(in_splits)(x, cotangents)
    assert_close(got, jax.jit(value_and_gradient(whole))(x, cotangents), 1e-5)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("size", kernels.DIMENSIONS)
def test_few_heads_of_a_long_sequence_fill_every_gpu(size, dtype):
    """The L40S has the most multiprocessors, 142."""
    for capability in (80, 86, 89, 90):
        chosen = scan_settings("delta_rule_scan", Target(capability), dtype, size, size)
        blocks = size // chosen.block
        chunks = 32768 // kernels.chunk_size(dtype, size, size)
        assert 2 * blocks * split_count(1, 2, chunks, blocks) >= 142


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((1, 64, 128, 4), 1),  # 256 programs without splits
        ((1, 2, 1024, 4), 32),
        ((1, 8, 512, 2), 16),
        ((1, 8, 10, 2), 1),  # two splits would cost more than they gain
        ((16, 8, 32, 2), 1),
    ],
)
def test_split_count(shape, count):
    assert split_count(*shape) == count


def program(x):
    o, state = ops.delta_rule(**x, implementation=KERNEL)
    return {"o": o, "state": state}


def of_two(heads):
    """Return inputs with a batch of two, and cotangents."""
    case = delta("batch", length=65, batch=2, key_heads=heads, heads=heads, key_dim=32, value_dim=32, decay="scalar")
    x = rounded(case.arrays, jnp.bfloat16)
    return x, random_like(jax.eval_shape(program, x), seed=1)


@functools.cache
def transformed():
    """Return inputs, cotangents, and the kernels' values and gradients without a transformation."""
    x, cotangents = of_two(heads=1)
    return x, cotangents, value_and_gradient(program)(x, cotangents)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_two_runs_are_equal_bit_for_bit():
    x, cotangents, want = transformed()
    assert_equal(value_and_gradient(program)(x, cotangents), want)


def test_jit():
    """XLA may round the gates differently there."""
    x, cotangents, want = transformed()
    assert_close(jax.jit(value_and_gradient(program))(x, cotangents), floats(want), 1e-3)


def test_remat():
    x, cotangents, want = transformed()
    assert_close(value_and_gradient(jax.checkpoint(program))(x, cotangents), floats(want), 1e-3)


def test_vmap():
    x, cotangents, want = transformed()
    x, cotangents = jax.tree.map(lambda array: array[:, None], (x, cotangents))
    got = jax.vmap(value_and_gradient(program))(x, cotangents)
    assert_close(jax.tree.map(lambda array: array[:, 0], got), floats(want), 1e-3)


def test_vmap_over_some_arguments():
    x, _, _ = transformed()
    got = jax.vmap(lambda beta: program(x | {"beta": beta}))(jnp.stack([x["beta"], 0.5 * x["beta"]]))
    want = [program(x | {"beta": beta}) for beta in (x["beta"], 0.5 * x["beta"])]
    assert_close(got, floats(jax.tree.map(lambda *parts: jnp.stack(parts), *want)), 1e-3)


def test_shard_map():
    x, cotangents = of_two(heads=2)
    want = value_and_gradient(program)(x, cotangents)
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    token, state = P("data", None, "heads"), P("data", "heads")
    specs = dict.fromkeys(("q", "k", "v", "beta", "log_decay"), token) | {"initial_state": state}
    sharded = jax.shard_map(program, mesh=mesh, in_specs=(specs,), out_specs={"o": token, "state": state})
    assert_close(jax.jit(value_and_gradient(sharded))(x, cotangents), floats(want), 1e-3)


def arguments(**changes):
    x = {
        "q": jnp.full((1, 8, 1, 64), 0.1, jnp.bfloat16),
        "k": jnp.full((1, 8, 1, 64), 0.1, jnp.bfloat16),
        "v": jnp.full((1, 8, 1, 64), 0.1, jnp.bfloat16),
        "beta": jnp.ones((1, 8, 1)),
    }
    return x | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict.fromkeys("qkv", jnp.ones((1, 8, 1, 64), jnp.int32)), "q: got int32, the kernels take bfloat16, float16"),
        ({"v": jnp.ones((1, 8, 1, 64), jnp.float16)}, "v: got float16 beside a q of bfloat16, the kernels take one"),
        (dict.fromkeys("qk", jnp.ones((1, 8, 1, 96), jnp.bfloat16)), "q: got a head dimension of 96, the kernels take"),
        ({"v": jnp.ones((1, 8, 1, 16), jnp.bfloat16)}, "v: got a head dimension of 16, the kernels take 32, 64, 128"),
        (
            {"beta": jnp.ones((1, 8, 1), jnp.bfloat16)},
            "beta: got bfloat16, the kernels keep gates and state in float32",
        ),
    ],
)
def test_unsupported_arguments(changes, message):
    state = jnp.zeros((1, 1, 64, 64))
    with pytest.raises(NotImplementedError, match=message):
        kernels.delta_rule(**arguments(**changes), scale=1.0, initial_state=state, target=INTERPRETER)
