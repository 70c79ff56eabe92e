"""Algebraic laws of the rules, checked by Hypothesis for arbitrary inputs, chunk sizes and splits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from osdn_jax import ops
from support import assert_close, jit
from support.cases import NAMED

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]

B, T, H, K, V = 1, 12, 3, 4, 5
TOLERANCE = 1e-11
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["scan", "chunk"])
SEEDS = st.integers(0, 10**6)


def inputs(seed):
    rng = np.random.default_rng(seed)
    x = {
        "q": rng.normal(size=(B, T, H, K)),
        "k": rng.normal(size=(B, T, H, K)),
        "v": rng.normal(size=(B, T, H, V)),
        "beta": rng.uniform(0, 1, size=(B, T, H)),
        "write_key": rng.normal(size=(B, T, H, K)),
        "log_decay": -rng.uniform(0, 2, size=(B, T, H)),
        "initial_state": rng.normal(size=(B, H, K, V)),
    }
    for name in ("k", "write_key"):  # so that the state does not grow
        x[name] /= np.linalg.norm(x[name], axis=-1, keepdims=True)
    return jax.tree.map(jnp.asarray, x)


@functools.cache
def delta_rule(implementation):
    """Return the compiled operator; all laws use the same shapes."""
    return jit(lambda x: ops.delta_rule(**x, implementation=implementation, chunk_size=4))


@settings(max_examples=2)  # each example compiles its own program
@given(chunk_size=st.integers(1, 20), cut=st.integers(0, T))
def test_chunk_size_and_splits_do_not_change_results(chunk_size, cut):
    """Neither the chunk size nor a split into two calls, the second with the state of the first, matters."""
    delta, rates = NAMED["delta: scalar decay, write key per key head"], NAMED["hypergradient: all options"]
    arrays = {name: x if name == "initial_state" else x[:, :T] for name, x in delta.arrays.items()}
    rest = {name: x if x.shape[1] < T else x[:, :T] for name, x in rates.arrays.items()}
    ids = delta.segment_ids[:, :T]
    # No split at the start of a segment: a call does not know earlier ids, so it would not reset the state.
    assume(cut in (0, T) or np.all(ids[:, cut] == ids[:, cut - 1]))
    ids = jnp.asarray(ids)

    def both(arrays, rest, ids, size):
        implementation = "scan" if size is None else "chunk"
        run = {"segment_ids": ids, "chunk_size": size, "implementation": implementation}
        return ops.delta_rule(**arrays, **run), ops.hypergradient_preconditioner(**rest, **rates.options, **run)

    @jit
    def program(arrays, rest):
        def run(start, stop, state, d):
            a = {name: x[:, start:stop] for name, x in arrays.items() if name != "initial_state"}
            r = {name: x[:, start:stop] if name in ("k", "beta", "log_forget") else x for name, x in rest.items()}
            return both(a | {"initial_state": state}, r | {"initial": d}, ids[:, start:stop], chunk_size)

        (o1, state), (d1, d) = run(0, cut, arrays["initial_state"], rest["initial"])
        (o2, state), (d2, d) = run(cut, T, state, d)
        joined = (jnp.concatenate([o1, o2], axis=1), state), (jnp.concatenate([d1, d2], axis=1), d)
        return joined, both(arrays, rest, ids, None)

    assert_close(*program(arrays, rest), TOLERANCE)


@IMPLEMENTATIONS
@given(seed=SEEDS, order=st.permutations(range(H)))
@settings(max_examples=6)
def test_heads_are_independent(implementation, seed, order):
    x, order = inputs(seed), np.asarray(order)
    o, state = delta_rule(implementation)(x)
    moved = {name: a[:, order] if name == "initial_state" else a[:, :, order] for name, a in x.items()}
    assert_close(delta_rule(implementation)(moved), (o[:, :, order], state[:, order]), TOLERANCE)


@IMPLEMENTATIONS
@given(seed=SEEDS, a=st.floats(-4, 4), b=st.floats(-4, 4))
@settings(max_examples=6)
def test_linear_in_values_and_state(implementation, seed, a, b):
    x, y = inputs(seed), inputs(seed + 1)
    y = x | {name: y[name] for name in ("v", "initial_state")}
    mixed = x | {name: a * x[name] + b * y[name] for name in ("v", "initial_state")}
    run = delta_rule(implementation)
    want = jax.tree.map(lambda s, t: a * s + b * t, run(x), run(y))
    sizes = jax.tree.map(lambda s, t: abs(a) * jnp.linalg.norm(s) + abs(b) * jnp.linalg.norm(t), run(x), run(y))
    for got, expected, size in zip(run(mixed), want, sizes, strict=True):
        assert np.linalg.norm(got - expected) <= TOLERANCE * size


@IMPLEMENTATIONS
@given(seed=SEEDS)
@settings(max_examples=6)
def test_residual_after_the_write(implementation, seed):
    """The residual after a write is (1 − beta <d, k²>) times the one before: the basis of the hypergradient."""
    x = inputs(seed)
    rng = np.random.default_rng(seed)
    d = rng.uniform(0, 2, size=x["k"].shape)
    x = {name: a[:, :1] if name != "initial_state" else a for name, a in x.items()} | {
        "write_key": (d * x["k"])[:, :1],
        "log_decay": jnp.zeros((B, 1, H)),
    }
    k, v = x["k"][:, 0], x["v"][:, 0]
    _, state = delta_rule(implementation)(x)
    before = v - np.einsum("bhk,bhkv->bhv", k, x["initial_state"])
    after = v - np.einsum("bhk,bhkv->bhv", k, state)
    factor = 1 - x["beta"][:, 0] * np.sum(d[:, 0] * k**2, axis=-1)
    np.testing.assert_allclose(after, factor[..., None] * before, rtol=0, atol=1e-12)


@IMPLEMENTATIONS
@given(seed=SEEDS)
@settings(max_examples=6)
def test_eigenvalues_of_the_transition(implementation, seed):
    """I − beta w k^T maps w to (1 − beta <w, k>) w and leaves vectors orthogonal to k unchanged."""
    x = {name: a[:, :1] if name != "initial_state" else a for name, a in inputs(seed).items()}
    no_writes = {"v": jnp.zeros((B, 1, H, K)), "log_decay": jnp.zeros((B, 1, H))}
    identity = jnp.broadcast_to(jnp.eye(K), (B, H, K, K))
    _, transition = delta_rule(implementation)(x | no_writes | {"initial_state": identity})
    w, k, beta = (x[name][0, 0] for name in ("write_key", "k", "beta"))
    for head in range(H):
        matrix = np.asarray(transition[0, head])
        factor = 1 - beta[head] * np.dot(w[head], k[head])
        np.testing.assert_allclose(matrix @ w[head], factor * w[head], rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(matrix), factor, rtol=0, atol=1e-12)
        _, _, v = np.linalg.svd(np.asarray(k[head])[None])
        np.testing.assert_allclose(matrix @ v[1:].T, v[1:].T, rtol=0, atol=1e-12)
