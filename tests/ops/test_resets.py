"""A decay of zero (log -inf or a very negative number) is a full reset in every form, with finite gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from support import assert_close, jit
from support.cases import Case, delta, gram, hypergradient

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

RESETS = (-np.inf, -1e9, float(np.finfo(np.float32).min))
GATE = {"delta_rule": "log_decay", "hypergradient_preconditioner": "log_forget", "gram_preconditioner": "log_decay"}


def with_resets(case, value):
    """Return the case with resets inside a chunk, at its start and twice in a row; per channel in half the channels."""
    gate = GATE[case.operator.function.__name__]
    x = case.arrays[gate].copy()
    if x.ndim == 4:
        x[:, [3, 16, 30, 31], :, ::2] = value
    else:
        x[:, [3, 16, 30, 31]] = value
    arrays = case.arrays | {gate: x}
    return Case(f"{case.name} {value}", case.operator, arrays, case.options, case.segment_ids, case.chunk_size)


RESET_CASES = [
    delta("delta: scalar decay", decay="scalar", write_key="value", packed=True),
    delta("delta: channel decay", decay="channel"),
    delta("delta: no erase", decay="channel", erase=False),
    hypergradient("hypergradient: unbounded", beta=True, forget=True, eta=0.5, initial=("head", 0.5, 1.5), packed=True),
    hypergradient("hypergradient: trust", beta=True, forget=True, eta=0.5, bounds=(2 / 3, 1.5), anchor=1.0),
    gram("gram", packed=True),
]


@pytest.mark.parametrize("value", RESETS)
@pytest.mark.parametrize("case", RESET_CASES, ids=lambda case: case.name)
def test_values_and_gradients(case, value):
    case = with_resets(case, value)
    assert_close(case.by_scan[0], case.expected, 1e-12)
    gate = GATE[case.operator.function.__name__]
    finite = with_resets(case, -2000.0)  # the same function, since exp(-2000) is 0
    assert_close(case.by_scan[1], finite.by_scan[1], 1e-12)
    for implementation in ("chunk", None):
        outputs, gradient = case.value_and_gradient(implementation)
        assert_close(outputs, case.expected, 1e-12)
        assert_close(gradient, case.by_scan[1], 1e-11)
        resets = np.asarray(gradient[gate])[case.arrays[gate] == value]
        np.testing.assert_array_equal(resets, 0.0)  # the exponential is flat there


@pytest.mark.parametrize("case", [RESET_CASES[0], RESET_CASES[3], RESET_CASES[5]], ids=lambda case: case.name)
def test_over_devices(case):
    """Sums of logs over a device's tokens keep their digits in the presence of a reset."""
    case = with_resets(case, -1e8)
    arrays = {name: x[:, :56] if x.shape[:2] == (2, 57) else x for name, x in case.arrays.items()}
    mesh = jax.make_mesh((4,), ("context",), axis_types=(AxisType.Auto,))
    specs = {name: P(None, "context") if x.shape[:2] == (2, 56) else P() for name, x in arrays.items()}

    def run(x, **options):
        return case.operator.function(**x, **case.options, chunk_size=16, implementation="chunk", **options)

    split = jax.shard_map(
        lambda x: run(x, context_axis="context"), mesh=mesh, in_specs=(specs,), out_specs=(P(None, "context"), P())
    )
    assert_close(jit(split)(arrays), jit(run)(arrays), 1e-11)


def test_float32_multipliers_over_devices():
    """Differences of cumulative sums put the multipliers after one token of -1e8 off by 0.07."""
    rng = np.random.default_rng(0)
    k = jnp.asarray(rng.normal(size=(1, 32, 1, 8)) / 3, jnp.float32)
    gain, log_decay = jnp.ones((1, 32, 1), jnp.float32), jnp.full((1, 32, 1), -0.4, jnp.float32)
    log_decay = log_decay.at[:, 10].set(-1e8)
    mesh, spec = jax.make_mesh((2,), ("context",), axis_types=(AxisType.Auto,)), P(None, "context")

    def run(axis):
        return lambda k, d, g: ops.gram_preconditioner(k, d, g, center=-0.2, context_axis=axis)[0]

    split = jax.shard_map(run("context"), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    np.testing.assert_allclose(jit(split)(k, log_decay, gain), jit(run(None))(k, log_decay, gain), rtol=1e-6)


def test_one_token():
    """The one-token step, too, resets the state."""
    x = {name: jnp.full((1, 2, 4), 0.5) for name in "qkv"} | {"beta": jnp.full((1, 2), 0.5)}
    state = jnp.full((1, 2, 4, 4), 3.0)
    fresh = ops.delta_rule_step(None, **x)
    assert_close(ops.delta_rule_step(state, **x, log_decay=jnp.full((1, 2), -jnp.inf)), fresh, 0.0)
    assert_close(ops.delta_rule_step(state, **x, log_decay=jnp.full((1, 2, 4), -jnp.inf)), fresh, 0.0)


def test_nan_is_no_reset():
    x = [jnp.full((1, 8, 1, 4), 0.5)] * 3 + [jnp.full((1, 8, 1), 0.5), jnp.full((1, 8, 1), -0.1).at[0, 2].set(jnp.nan)]
    for implementation in ("scan", "chunk"):
        o, _ = ops.gated_delta_net(*x[:3], beta=x[3], log_decay=x[4], implementation=implementation)
        assert np.isnan(o[:, 2:]).all()


def test_in_float32():
    """As users call it: float32, not under jit, the default implementation."""
    x = [jnp.full((1, 40, 1, 4), 0.5, jnp.float32)] * 3 + [jnp.full((1, 40, 1), 0.5, jnp.float32)]
    decay = jnp.full((1, 40, 1), -0.1, jnp.float32).at[0, 10].set(-jnp.inf)

    def run(implementation):
        def loss(v, decay):
            return jnp.sum(
                ops.gated_delta_net(x[0], x[1], v, beta=x[3], log_decay=decay, implementation=implementation)[0]
            )

        return jax.value_and_grad(loss, argnums=(0, 1))(x[2], decay)

    want = run("scan")
    for implementation in ("chunk", None):
        assert_close(run(implementation), want, 1e-5)
