"""Sequences that are packed, padded, or split between calls: what the state carries and when it is reset."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit, value_and_gradient
from support.cases import CASES, DELTA, GRAM, HYPERGRADIENT, IMPLEMENTATIONS, NAMED, SQUARES

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
ONCE = {"initial_state", "initial", "center", "log_squash", "eta", "anchor", "restart"}  # arrays without a time axis
PACKED = [
    NAMED["delta: channel decay, write key per value head"],
    NAMED["hypergradient: all options"],
    NAMED["gram: packed"],
    NAMED["squares: sum"],
    NAMED["squares: average"],
]
PRECONDITIONERS = {HYPERGRADIENT: "hypergradient", GRAM: "gram", SQUARES: "squares"}
RESTARTING = (HYPERGRADIENT, SQUARES)  # segments start from a value that is not zero


def cut(case, x, start, stop):
    return {name: array if name in ONCE else array[:, start:stop] for name, array in x.items()}


@pytest.mark.parametrize("case", [c for c in CASES if c.segment_ids is not None], ids=lambda case: case.name)
def test_packed_segments_equal_separate_sequences(case):
    """In the oracle; test_cases.py compares every implementation with it, gradients included."""
    token, state = case.operator.outputs
    state_argument = case.operator.state_argument
    for row, ids in enumerate(case.segment_ids):
        edges = [0, *np.flatnonzero(np.diff(ids)) + 1, len(ids)]
        one_row = {
            name: x[row : row + 1] if x.shape[0] == len(case.segment_ids) and name != "center" else x
            for name, x in case.arrays.items()
        }
        for start, stop in itertools.pairwise(edges):
            x, options = cut(case, one_row, start, stop), dict(case.options)
            restart = x.pop("restart", options.pop("restart", None))
            if start > 0 and case.operator not in RESTARTING:
                x.pop(state_argument, None)
            elif start > 0 and restart is not None:
                options.pop(state_argument, None)
                x[state_argument] = restart
            after = dict(zip((token, state), case.operator.oracle(**x, **options), strict=True))
            assert_close(case.expected[token][row : row + 1, start:stop], after[token], TOLERANCE)
        assert_close(case.expected[state][row : row + 1], after[state], TOLERANCE)


def in_several_calls(case, implementation, edges):
    """Return a function that runs the tokens between two edges per call and passes the state on."""
    token, state = case.operator.outputs

    def outputs(x):
        x, results = dict(x), []
        if case.operator in RESTARTING and "restart" not in case.options:
            x.setdefault("restart", x["initial"])
        for start, stop in itertools.pairwise(edges):
            ids = jnp.asarray(case.segment_ids[:, start:stop])
            result = case.run(implementation, segment_ids=ids)(cut(case, x, start, stop))
            x[case.operator.state_argument] = result[state]
            results.append(result[token])
        return {token: jnp.concatenate(results, axis=1), state: result[state]}

    return outputs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_calls_that_pass_the_state_on_equal_one_call(case, implementation):
    outputs = in_several_calls(case, implementation, [0, 22, 22, case.arrays["k"].shape[1]])
    if implementation == "scan":
        value, gradient = jit(value_and_gradient(outputs))(case.arrays, case.cotangents)
        assert_close(gradient, case.by_scan[1], TOLERANCE)
    else:
        value = jit(outputs)(case.arrays)
    assert_close(value, case.expected, TOLERANCE)


@pytest.mark.parametrize("implementation", ["scan", "chunk"])
@pytest.mark.parametrize("case", [c for c in PACKED if c.operator is not SQUARES], ids=lambda case: case.name)
def test_padding_changes_nothing(case, implementation):
    """Tokens with beta 0 and log decay 0 after the sequence have no effect and no gradient."""
    token, state = case.operator.outputs
    length, more = case.arrays["k"].shape[1], 9
    rng = np.random.default_rng(3)

    def padded(name, x):
        if name in ONCE:
            return x
        shape = (x.shape[0], more, *x.shape[2:])
        silent = name in ("beta", "gain", "log_decay", "log_forget")
        return np.concatenate([x, np.zeros(shape) if silent else rng.normal(size=shape)], axis=1)

    x = {name: padded(name, array) for name, array in case.arrays.items()}
    ids = jnp.asarray(np.pad(case.segment_ids, ((0, 0), (0, more)), mode="edge"))

    def outputs(x):
        out = case.run(implementation, segment_ids=ids)(x)
        return {token: out[token][:, :length], state: out[state]}

    if implementation == "chunk":
        assert_close(jit(outputs)(x), case.expected, TOLERANCE)
        return
    value, gradient = jit(value_and_gradient(outputs))(x, case.cotangents)
    assert_close(value, case.expected, TOLERANCE)
    assert_close(cut(case, gradient, 0, length), case.by_scan[1], TOLERANCE)
    # Except for the gates themselves: a larger gate would let the padding write.
    for name in gradient.keys() - ONCE - {"beta", "gain", "log_decay", "log_forget"}:
        np.testing.assert_array_equal(gradient[name][:, length:], 0.0)


STEPS = [c for c in CASES if c.operator is DELTA and c.arrays["k"].shape[1] > 1 and c.segment_ids is None]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_steps_equal_the_sequence(case):
    options = {name: case.options[name] for name in ("erase", "scale") if name in case.options}

    @jit
    def decode(x):
        x = dict(x)
        state = x.pop("initial_state", None)
        if state is None:  # a first step without a state, to cover the default
            first = {name: array[:, 0] for name, array in x.items()}
            o, state = ops.delta_rule_step(None, **first, **options)
            x = {name: array[:, 1:] for name, array in x.items()}
        else:
            o = None

        def step(state, token):
            o, state = ops.delta_rule_step(state, **token, **options)
            return state, o

        state, rest = jax.lax.scan(step, state, {name: jnp.moveaxis(array, 1, 0) for name, array in x.items()})
        rest = jnp.moveaxis(rest, 0, 1)
        return {"o": rest if o is None else jnp.concatenate([o[:, None], rest], axis=1), "state": state}

    assert_close(decode(case.arrays), case.expected, TOLERANCE)


@pytest.mark.parametrize(
    "operator", [DELTA, HYPERGRADIENT, GRAM, SQUARES], ids=["delta", "hypergradient", "gram", "squares"]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_id_of_a_call_is_no_reset(operator, implementation):
    """Only a change of the id resets the state, whatever the first id is."""
    case = next(c for c in CASES if c.operator is operator and c.name.endswith("one token"))
    ids = jnp.full((2, 1), 7, jnp.int32)
    assert_close(jit(case.run(implementation, segment_ids=ids))(case.arrays), case.expected, TOLERANCE)


@pytest.mark.usefixtures("our_checks")
@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32, np.int16])
@pytest.mark.parametrize("implementation", ["scan", "chunk"])
def test_ids_of_any_integer_type_stay_apart(implementation, dtype):
    """Ids that are 2^32 or 2^63 apart mark two segments without x64, too, although JAX truncates them to one id."""
    rng = np.random.default_rng(0)
    step = min(np.iinfo(dtype).max, 2**32 if dtype == np.int64 else np.iinfo(dtype).max - 7)
    segments = (np.array([0, 0, 1, 1, 1, 2]) * (step // 2) + 3).astype(dtype)[None]
    with jax.enable_x64(False):
        q, k, v = (jnp.asarray(rng.normal(size=(1, 6, 1, 4)), jnp.float32) for _ in range(3))
        beta, gate = jnp.full((1, 6, 1), 0.5, jnp.float32), jnp.full((1, 6, 1), -0.1, jnp.float32)
        for ids in (segments, segments[:, ::-1].copy()):
            small = jnp.asarray(np.unique(ids, return_inverse=True)[1].reshape(ids.shape), jnp.int32)
            gram = {"gram_log_decay": gate, "gram_gain": -gate}
            for rule, more in ((ops.delta_net, {}), (ops.osdn, {}), (ops.pdn, gram)):
                got, want = (
                    rule(q, k, v, beta=beta, **more, segment_ids=x, implementation=implementation) for x in (ids, small)
                )
                assert_close(tuple(got[1]), tuple(want[1]), 1e-6)
                assert_close(got[0], want[0], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["scan", "chunk", None])
@pytest.mark.parametrize("rule", ["kda", "os_gdn", "pgdn"])
def test_float64_state_stays_float64_with_float32_tokens(rule, implementation):
    """So that `lax.scan` can carry it."""
    rng = np.random.default_rng(0)
    uniform = lambda *shape: jnp.asarray(rng.uniform(0.1, 0.5, size=shape), jnp.float32)
    x = {name: uniform(1, 4, 2, 3) for name in "qkv"}
    x |= {"beta": uniform(1, 4, 2), "log_decay": -uniform(1, 4, 2, *(() if rule != "kda" else (3,)))}
    x |= {"gram_log_decay": -uniform(1, 4, 2), "gram_gain": uniform(1, 4, 2)} if rule == "pgdn" else {}
    run = lambda x, state: getattr(ops, rule)(**x, initial_state=state, implementation=implementation)
    _, state = run(x, None)
    assert {y.dtype for y in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    wide = jax.tree.map(lambda y: y.astype(jnp.float64) + 1e-12, state)

    def step(state, _):
        o, state = run(x, state)
        return state, o

    after, o = jax.lax.scan(step, wide, length=2)
    assert {y.dtype for y in jax.tree.leaves(after)} == {jnp.dtype(jnp.float64)}
    assert o.dtype == jnp.float32
    exact = jax.tree.map(lambda y: y.astype(jnp.float64), x)
    assert_close(tuple(run(x, wide)[1]), tuple(run(exact, wide)[1]), 1e-6)
    # A difference of 1e-10, which float32 cannot represent here, reaches the final state.
    far = jax.tree.map(lambda y: y + 1e-10, wide)
    assert not np.array_equal(run(x, far)[1].recurrent, run(x, wide)[1].recurrent)


def test_float64_states_of_one_step_and_of_preconditioners():
    q, k, v = (jnp.full((1, 2, 3), 0.5, jnp.float32) for _ in range(3))
    beta, state = jnp.full((1, 2), 0.5, jnp.float32), jnp.full((1, 2, 3, 3), 0.1)
    assert ops.delta_rule_step(state, q, k, v, beta)[1].dtype == jnp.float64
    k, initial = k[:, None], jnp.full((1, 2, 3), 0.1)
    gate = jnp.full((1, 1, 2), -0.5, jnp.float32)
    assert ops.hypergradient_preconditioner(k, eta=0.1, initial=initial)[1].dtype == jnp.float64
    assert ops.gram_preconditioner(k, gate, -gate, center=-0.2, initial=initial)[1].dtype == jnp.float64
