"""The delta rule with a preconditioner of squared keys: prefill, steps and states, against the NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from osdn_jax import ops
from osdn_jax.ops.rules.entry import Hypergradient, Squares, preconditioned_delta_rule
from osdn_jax.ops.rules.state import GramState, SquaresState
from support import assert_close, jit, oracle
from support.cases import ids, squares, unit

B, T, HK, H, K, V = 2, 21, 2, 4, 6, 5
SETTINGS = {"sum": {}, "average": {"average": 0.8}, "normalized": {"average": 0.8, "normalize": True}}
SEGMENTS = ids(((4, 9), (1, 16)), B, T)


def arrays():
    rng = np.random.default_rng(0)
    x = {"q": rng.normal(size=(B, T, HK, K)), "k": unit(rng.normal(size=(B, T, HK, K)))}
    x |= {"v": rng.normal(size=(B, T, H, V)), "beta": rng.uniform(size=(B, T, H))}
    return x | {"log_decay": -rng.uniform(0, 0.3, size=(B, T, H)), "initial": rng.uniform(0.2, 1.5, size=(HK, K))}


def rule(x, settings, state=None, segments=None, **options):
    x = jax.tree.map(jnp.asarray, x)
    preconditioner = Squares(**settings, initial=x.pop("initial"))
    return preconditioned_delta_rule(
        **x, preconditioner=preconditioner, initial_state=state, segment_ids=segments, **options
    )


def by_oracle(x, settings, segments):
    multiplier, final = oracle.squares(x["k"], initial=x["initial"], segment_ids=segments, **settings)
    rest = {name: a for name, a in x.items() if name != "initial"}
    o, recurrent = oracle.delta_rule(**rest, write_key=multiplier * x["k"], segment_ids=segments)
    return o, (recurrent, final)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
@pytest.mark.parametrize("settings", SETTINGS)
def test_sequence_and_steps(settings, implementation):
    settings, x = SETTINGS[settings], arrays()
    want = by_oracle(x, settings, SEGMENTS)
    run = jit(functools.partial(rule, settings=settings, implementation=implementation, chunk_size=8))
    got, after = run(x, segments=jnp.asarray(SEGMENTS))
    assert type(after) is SquaresState
    assert_close((got, tuple(after)), want, 1e-12)

    once = {"initial": x["initial"]}
    token = lambda t: {name: a[:, t : t + 1] for name, a in x.items() if name != "initial"} | once
    steps, carried = [], None
    for t in range(6):
        part, carried = run(token(t), state=carried, segments=None)
        steps.append(part)
    whole, _ = by_oracle(x, settings, None)
    assert_close(jnp.concatenate(steps, axis=1), whole[:, :6], 1e-12)


@pytest.mark.usefixtures("float64")
def test_a_segment_after_a_state_starts_from_the_learned_start():
    """Not from the state that the call began with."""
    x = arrays()
    _, state = rule(x, {})
    marks = jnp.asarray(ids(((5,), (5,)), B, T))
    o, _ = rule(x, {}, state, marks)
    later = {name: a if name == "initial" else a[:, 5:] for name, a in x.items()}
    assert_close(o[:, 5:], rule(later, {})[0], 1e-12)


def test_bfloat16_keys_have_a_float32_state():
    k = jnp.asarray(arrays()["k"], jnp.bfloat16)
    multiplier, final = ops.squares_preconditioner(k, initial=0.5)
    write_key, _ = ops.squares_write_key(k, initial=0.5)
    assert (multiplier.dtype, final.dtype, write_key.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    want, _ = oracle.squares(np.asarray(k, np.float64), initial=0.5)
    assert_close(multiplier, want, 1e-5)


def test_the_state_of_another_rule_is_refused():
    x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays())
    recurrent, kept = jnp.zeros((B, H, K, V)), jnp.zeros((B, HK, K))
    with pytest.raises(ValueError, match="initial_state: got the GramState of another rule, expected a SquaresState"):
        rule(x, {}, GramState(recurrent, kept))
    with pytest.raises(ValueError, match=r"initial_state.preconditioner: got shape \(2, 4, 6\), expected \[B, Hk, K\]"):
        rule(x, {}, SquaresState(recurrent, jnp.zeros((B, H, K))))
    del x["initial"]
    with pytest.raises(ValueError, match="initial_state: got the SquaresState of another rule"):
        preconditioned_delta_rule(**x, preconditioner=Hypergradient(), initial_state=SquaresState(recurrent, kept))
    assert type(rule(arrays(), {}, ops.State(recurrent))[1]) is ops.State


@pytest.mark.usefixtures("float64")
def test_heads_and_rows_over_explicit_devices():
    case = squares("sharded", length=9, initial=("head", 0.5, 1.5), average=0.9, heads=2)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    k = jax.device_put(case.arrays["k"], jax.NamedSharding(mesh, P("data", None, "tensor")))
    got = jit(case.run(None))({"k": k, "initial": case.arrays["initial"]})
    assert jax.typeof(got["multiplier"]).sharding.spec == P("data", None, "tensor", None)
    assert_close(got, case.expected, 1e-12)
