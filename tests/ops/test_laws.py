"""Laws of the rules, by Hypothesis: for arbitrary numbers, chunk sizes and cuts."""

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

pytestmark = pytest.mark.usefixtures("float64")

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
    for name in ("k", "write_key"):  # so that the memory stays of the size of the values
        x[name] /= np.linalg.norm(x[name], axis=-1, keepdims=True)
    return jax.tree.map(jnp.asarray, x)


@functools.cache
def delta_rule(implementation):
    """Compiled once: every law keeps the shapes."""
    return jit(lambda x: ops.delta_rule(**x, implementation=implementation, chunk_size=4))


@settings(max_examples=2)  # each compiles its own programs
@given(chunk_size=st.integers(1, 20), cut=st.integers(0, T))
def test_chunks_and_cuts_are_of_no_consequence(chunk_size, cut):
    """What is computed does not depend on the chunk size, nor on where a sequence is cut in two and carried on."""
    delta, rates = NAMED["delta: scalar decay, write key per key head"], NAMED["hypergradient: everything"]
    arrays = {name: x if name == "initial_state" else x[:, :T] for name, x in delta.arrays.items()}
    rest = {name: x if x.shape[1] < T else x[:, :T] for name, x in rates.arrays.items()}
    ids = delta.segment_ids[:, :T]
    # Cut at the start of a document it would get the memory of the one before: a call knows no earlier ids.
    assume(cut in (0, T) or np.all(ids[:, cut] == ids[:, cut - 1]))
    ids = jnp.asarray(ids)

    def both(arrays, rest, ids, size):
        implementation = "scan" if size is None else "chunk"
        run = {"segment_ids": ids, "chunk_size": size, "implementation": implementation}
        return ops.delta_rule(**arrays, **run), ops.hypergradient_preconditioner(**rest, **rates.options, **run)

    @jit
    def program(arrays, rest):
        def part(start, stop, memory, d):
            a = {name: x[:, start:stop] for name, x in arrays.items() if name != "initial_state"}
            r = {name: x[:, start:stop] if name in ("k", "beta", "log_forget") else x for name, x in rest.items()}
            return both(a | {"initial_state": memory}, r | {"initial": d}, ids[:, start:stop], chunk_size)

        (o1, memory), (d1, d) = part(0, cut, arrays["initial_state"], rest["initial"])
        (o2, memory), (d2, d) = part(cut, T, memory, d)
        pieces = (jnp.concatenate([o1, o2], axis=1), memory), (jnp.concatenate([d1, d2], axis=1), d)
        return pieces, both(arrays, rest, ids, None)

    assert_close(*program(arrays, rest), TOLERANCE)


@IMPLEMENTATIONS
@given(seed=SEEDS, order=st.permutations(range(H)))
@settings(max_examples=6)
def test_heads_are_independent(implementation, seed, order):
    x, order = inputs(seed), np.asarray(order)
    o, memory = delta_rule(implementation)(x)
    moved = {name: a[:, order] if name == "initial_state" else a[:, :, order] for name, a in x.items()}
    assert_close(delta_rule(implementation)(moved), (o[:, :, order], memory[:, order]), TOLERANCE)


@IMPLEMENTATIONS
@given(seed=SEEDS, a=st.floats(-4, 4), b=st.floats(-4, 4))
@settings(max_examples=6)
def test_linear_in_values_and_memory(implementation, seed, a, b):
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
    """e' = (1 − beta <d, k²>) e, the identity that the hypergradient rests on: what is left of a token's own error."""
    x = inputs(seed)
    rng = np.random.default_rng(seed)
    d = rng.uniform(0, 2, size=x["k"].shape)
    x = {name: a[:, :1] if name != "initial_state" else a for name, a in x.items()} | {
        "write_key": (d * x["k"])[:, :1],
        "log_decay": jnp.zeros((B, 1, H)),
    }
    k, v = x["k"][:, 0], x["v"][:, 0]
    _, memory = delta_rule(implementation)(x)
    before = v - np.einsum("bhk,bhkv->bhv", k, x["initial_state"])
    after = v - np.einsum("bhk,bhkv->bhv", k, memory)
    factor = 1 - x["beta"][:, 0] * np.sum(d[:, 0] * k**2, axis=-1)
    np.testing.assert_allclose(after, factor[..., None] * before, rtol=0, atol=1e-12)


@IMPLEMENTATIONS
@given(seed=SEEDS)
@settings(max_examples=6)
def test_eigenvalues_of_the_transition(implementation, seed):
    """I − beta w k^T keeps what is orthogonal to k, and takes w to (1 − beta <w, k>) w."""
    x = {name: a[:, :1] if name != "initial_state" else a for name, a in inputs(seed).items()}
    silent = {"v": jnp.zeros((B, 1, H, K)), "log_decay": jnp.zeros((B, 1, H))}
    identity = jnp.broadcast_to(jnp.eye(K), (B, H, K, K))
    _, transition = delta_rule(implementation)(x | silent | {"initial_state": identity})
    w, k, beta = (x[name][0, 0] for name in ("write_key", "k", "beta"))
    for head in range(H):
        matrix = np.asarray(transition[0, head])
        factor = 1 - beta[head] * np.dot(w[head], k[head])
        np.testing.assert_allclose(matrix @ w[head], factor * w[head], rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(matrix), factor, rtol=0, atol=1e-12)
        _, _, v = np.linalg.svd(np.asarray(k[head])[None])
        np.testing.assert_allclose(matrix @ v[1:].T, v[1:].T, rtol=0, atol=1e-12)
