"""Preconditioned DeltaNet with the exact Gram is ridge regression: docs/theory.md, "The exact Gram"."""

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support.theory import SIZES, heads, unit_keys

pytestmark = pytest.mark.usefixtures("float64")


def data(size, value_size, tokens):
    rng = np.random.default_rng(size)
    shape = (1, tokens, size)
    return rng.normal(size=shape), unit_keys(rng, shape, condition=30.0), rng.normal(size=(1, tokens, value_size))


@pytest.mark.parametrize("ridge", [0.1, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"K{size[0]}")
def test_three_forms_of_one_output(size, ridge):
    """After every token: the delta rule, linear attention read with P_t q_t, and the normal equations' solution."""
    q, k, v = data(*size)
    o, state = ops.exact_pdn(*heads(q, k, v), ridge=ridge)
    outer = lambda a, b: np.cumsum(np.einsum("ti,tj->tij", a[0], b[0]), axis=0)
    gram = ridge * np.eye(size[0]) + outer(k, k)
    solutions = np.linalg.solve(gram, outer(k, v))
    np.testing.assert_allclose(state.recurrent[0, 0], solutions[-1], rtol=0, atol=1e-9)
    expected = size[0] ** -0.5 * np.einsum("tkv,tk->tv", solutions, q[0])
    np.testing.assert_allclose(o[0, :, 0], expected, rtol=0, atol=1e-9)
    preconditioned = np.linalg.solve(gram, q[0][..., None])[None, ..., 0]
    attention, _ = ops.linear_attention(*heads(preconditioned, k, v))
    np.testing.assert_allclose(o, attention, rtol=0, atol=1e-9)


def test_the_solution_is_the_minimum_of_the_ridge_loss():
    """Independent of the normal equations: every direction away from it increases the loss."""
    _, k, v = data(6, 3, 40)
    state = np.asarray(ops.exact_pdn(*heads(k, k, v), ridge=0.5)[1].recurrent[0, 0])
    loss = lambda s: np.sum((v[0] - k[0] @ s) ** 2) + 0.5 * np.sum(s**2)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1e-1):
        assert all(loss(state + scale * rng.normal(size=state.shape)) > loss(state) for _ in range(50))


def diagonal_forms(k, v, ridge=1.0):
    """Return (state of the delta rule, state of preconditioned linear attention) with a diagonal Gram, [K, V] each."""
    before = ridge + np.cumsum(k**2, axis=1) - k**2
    scaled = k / before
    w = scaled / (1 + np.sum(scaled * k, axis=-1, keepdims=True))
    keys, values, write_key, beta = heads(k, v, w, np.ones(k.shape[:2]))
    delta = ops.delta_rule(keys, keys, values, beta, write_key=write_key)[1][0, 0]
    additive = ops.linear_attention(keys, keys, values)[1].recurrent[0, 0]
    gram = ridge + jnp.sum(keys**2, axis=(0, 1, 2))
    return np.asarray(delta), np.asarray(additive / gram[:, None])


def test_not_for_a_diagonal():
    """In two dimensions, keys (1, 1)/√2 and (1, 0): the diagonal drops the correlation that makes the forms equal."""
    k = np.array([[[0.5**0.5, 0.5**0.5], [1.0, 0.0]]])
    delta, attention = diagonal_forms(k, np.ones((1, 2, 1)))
    root = 0.5**0.5
    first = root / 2  # both channels of the state after the first token, w = k / 2
    np.testing.assert_allclose(delta[:, 0], [first + (1 - first) / 2.5, first], rtol=1e-12)
    np.testing.assert_allclose(attention[:, 0], [(root + 1) / 2.5, root / 1.5], rtol=1e-12)
    ridge = np.linalg.solve(np.eye(2) + k[0].T @ k[0], k[0].T @ np.ones((2, 1)))[:, 0]
    for form in (delta[:, 0], attention[:, 0]):
        assert np.max(np.abs(form - ridge)) > 0.02
    assert np.max(np.abs(delta - attention)) > 0.1


def test_for_a_diagonal_with_keys_on_the_axes():
    """There the Gram is diagonal, and all forms agree again."""
    rng = np.random.default_rng(0)
    k = rng.uniform(0.5, 1, size=(1, 30, 1)) * np.eye(4)[rng.integers(0, 4, size=(1, 30))]
    v = rng.normal(size=(1, 30, 3))
    delta, attention = diagonal_forms(k, v, ridge=0.3)
    ridge = np.linalg.solve(0.3 * np.eye(4) + k[0].T @ k[0], k[0].T @ v[0])
    np.testing.assert_allclose(delta, ridge, rtol=0, atol=1e-12)
    np.testing.assert_allclose(attention, ridge, rtol=0, atol=1e-12)
