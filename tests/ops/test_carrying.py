"""Sequences in pieces, packed and padded: what is carried, where it starts anew, and what changes nothing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support import assert_close, jit, value_and_gradient
from support.cases import CASES, DELTA, GRAM, HYPERGRADIENT, IMPLEMENTATIONS, NAMED

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-12
ONCE = {"initial_state", "initial", "center", "anchor", "restart"}  # arrays without a time axis
PACKED = [
    NAMED["delta: channel decay, write key per value head"],
    NAMED["hypergradient: everything"],
    NAMED["gram: packed"],
]


def cut(case, x, start, stop):
    return {name: array if name in ONCE else array[:, start:stop] for name, array in x.items()}


@pytest.mark.parametrize("case", [c for c in CASES if c.segment_ids is not None], ids=lambda case: case.name)
def test_packed_documents_equal_separate_ones(case):
    """By the oracle, to which test_cases.py holds the packed form of every implementation, gradients included."""
    token, state = case.operator.outputs
    carried = case.operator.carried
    for row, ids in enumerate(case.segment_ids):
        edges = [0, *np.flatnonzero(np.diff(ids)) + 1, len(ids)]
        one_row = {
            name: x[row : row + 1] if x.shape[0] == len(case.segment_ids) and name != "center" else x
            for name, x in case.arrays.items()
        }
        for start, stop in itertools.pairwise(edges):
            x, options = cut(case, one_row, start, stop), dict(case.options)
            restart = x.pop("restart", options.pop("restart", None))
            if start > 0 and case.operator is not HYPERGRADIENT:
                x.pop(carried, None)
            elif start > 0 and restart is not None:
                options.pop(carried, None)
                x[carried] = restart
            after = dict(zip((token, state), case.operator.oracle(**x, **options), strict=True))
            assert_close(case.expected[token][row : row + 1, start:stop], after[token], TOLERANCE)
        assert_close(case.expected[state][row : row + 1], after[state], TOLERANCE)


def in_pieces(case, implementation, edges):
    token, state = case.operator.outputs

    def outputs(x):
        x, pieces = dict(x), []
        if case.operator is HYPERGRADIENT:
            x.setdefault("restart", x["initial"])
        for start, stop in itertools.pairwise(edges):
            ids = jnp.asarray(case.segment_ids[:, start:stop])
            piece = case.run(implementation, segment_ids=ids)(cut(case, x, start, stop))
            x[case.operator.carried] = piece[state]
            pieces.append(piece[token])
        return {token: jnp.concatenate(pieces, axis=1), state: piece[state]}

    return outputs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_calls_with_carried_states_are_one_call(case, implementation):
    outputs = in_pieces(case, implementation, [0, 22, 22, case.arrays["k"].shape[1]])
    if implementation == "scan":
        value, gradient = jit(value_and_gradient(outputs))(case.arrays, case.cotangents)
        assert_close(gradient, case.by_scan[1], TOLERANCE)
    else:
        value = jit(outputs)(case.arrays)
    assert_close(value, case.expected, TOLERANCE)


@pytest.mark.parametrize("implementation", ["scan", "chunk"])
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_padding_changes_nothing(case, implementation):
    """Tokens of strength 0 and log decay 0 after the sequence; their gradient is zero."""
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
    # What silences a token is also what would have let it write: only those have a gradient there.
    for name in gradient.keys() - ONCE - {"beta", "gain", "log_decay", "log_forget"}:
        np.testing.assert_array_equal(gradient[name][:, length:], 0.0)


STEPS = [c for c in CASES if c.operator is DELTA and c.arrays["k"].shape[1] > 1 and c.segment_ids is None]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.name)
def test_steps_are_the_sequence(case):
    options = {name: case.options[name] for name in ("erase", "scale") if name in case.options}

    @jit
    def decode(x):
        x = dict(x)
        memory = x.pop("initial_state", None)
        if memory is None:  # the first token, so that the default is used too
            first = {name: array[:, 0] for name, array in x.items()}
            o, memory = ops.delta_rule_step(None, **first, **options)
            x = {name: array[:, 1:] for name, array in x.items()}
        else:
            o = None

        def step(memory, token):
            o, memory = ops.delta_rule_step(memory, **token, **options)
            return memory, o

        memory, rest = jax.lax.scan(step, memory, {name: jnp.moveaxis(array, 1, 0) for name, array in x.items()})
        rest = jnp.moveaxis(rest, 0, 1)
        return {"o": rest if o is None else jnp.concatenate([o[:, None], rest], axis=1), "memory": memory}

    assert_close(decode(case.arrays), case.expected, TOLERANCE)


@pytest.mark.parametrize("operator", [DELTA, HYPERGRADIENT, GRAM], ids=["delta", "hypergradient", "gram"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_is_carried_from_a_first_token(operator, implementation):
    """Only a change of id starts anew: the first id of a call is no change, whatever it is."""
    case = next(c for c in CASES if c.operator is operator and c.name.endswith("one token"))
    ids = jnp.full((2, 1), 7, jnp.int32)
    assert_close(jit(case.run(implementation, segment_ids=ids))(case.arrays), case.expected, TOLERANCE)
