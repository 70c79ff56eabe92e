"""Hypergradient steps on one fixed loss: docs/theory.md, "One fixed loss"."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from osdn_jax import ops
from support.theory import heads, residuals, rotation, unit, unit_keys

pytestmark = pytest.mark.usefixtures("float64")

SIZE = 16


@functools.partial(jax.jit, static_argnames="steps")
def descend(k, v, eta, start, steps=400):
    """Minimise f(S) = ½ Σ_n |v_n − Sᵀk_n|² over all tokens at once; return (f by step, d after the last step).

    Gradients and steps are calls of the operator: a read of all residuals at the same state, and a write of all of them
    that corrects nothing in between. After a step along D G, d moves by η rowsum(G' ⊙ G) / |G|², the gradient G' of f
    after the step against the one before it; the step is taken if it does not increase f.
    """

    def residuals(state):
        o, _ = ops.delta_rule(k, k, v, jnp.zeros(k.shape[:3]), initial_state=state, scale=1.0)
        return v - o

    def write(state, w, e):
        return ops.delta_rule(k, k, e, jnp.ones(k.shape[:3]), write_key=w, erase=False, initial_state=state)[1]

    def step(carry, _):
        state, d = carry
        e = residuals(state)
        f = 0.5 * jnp.sum(e**2)
        gradient = write(jnp.zeros_like(state), k, e)  # -G
        moved = write(state, k * d[None, None, None], e)
        e_moved = residuals(moved)
        after = write(jnp.zeros_like(state), k, e_moved)
        size = jnp.sum(gradient**2)
        d = d + jnp.where(size > 1e-300, eta * jnp.sum(gradient * after, axis=(0, 1, 3)) / size, 0.0)
        return (jnp.where(0.5 * jnp.sum(e_moved**2) <= f, moved, state), d), f

    (_, d), f = lax.scan(step, (jnp.zeros((1, 1, k.shape[-1], v.shape[-1])), start), length=steps)
    return f, d


def losses(condition, rotate, eta, start=1.0):
    """Return log10 of f relative to its start until 1e-24, for K tokens whose Gram has that condition number."""
    rng = np.random.default_rng(0)
    axes = rotation(rng, SIZE) if rotate else np.eye(SIZE)
    k = np.geomspace(1.0, condition**-0.5, SIZE)[:, None] * axes
    f, _ = descend(*heads(k[None], (k @ rng.normal(size=(SIZE, SIZE)))[None]), eta, jnp.full(SIZE, start))
    logs = np.log10(np.maximum(np.asarray(f) / f[0], 1e-300))
    return logs[logs > -24]


def rates(logs):
    """Return the digits gained a step in the four quarters of a run."""
    return np.array([(part[0] - part[-1]) / (len(part) - 1) for part in np.array_split(logs, 4)])


@pytest.mark.parametrize("eta", [1.0, 3.0])
def test_faster_than_geometric_on_an_axis_aligned_gram(eta):
    """A diagonal can be the inverse of this Gram: each quarter of the run is faster than the one before."""
    logs = losses(100.0, rotate=False, eta=eta)
    quarters = rates(logs)
    assert len(logs) < 400  # to 1e-24 within the 400 steps
    assert np.all(np.diff(quarters) > 0)
    assert quarters[3] > 2 * quarters[0]


def test_geometric_on_a_rotated_gram():
    """No diagonal inverts this one: after the start the rate stays where it is, and 400 steps do not suffice."""
    logs = losses(100.0, rotate=True, eta=3.0)
    first, second, third, fourth = rates(logs)
    assert len(logs) == 400
    assert max(second, third, fourth) < 1.25 * min(second, third, fourth)
    assert fourth < first
    assert -logs[-1] < 0.7 * 24


def test_gradient_descent_slows_down_on_both():
    """η = 0 with d = 1 = 1/λ_max: the strong channels go first, the weak ones remain."""
    for rotate in (False, True):
        quarters = rates(losses(100.0, rotate, eta=0.0))
        assert np.all(np.diff(quarters) < 0)
        assert quarters[3] < 0.4 * quarters[0]


def test_d_becomes_the_inverse_of_a_diagonal_gram():
    k = np.diag([1.0, 0.5, 0.25])
    _, d = descend(*heads(k[None], np.ones((1, 3, 2))), 3.0, jnp.ones(3))
    np.testing.assert_allclose(d, np.diag(k) ** -2.0, rtol=0.05)


def test_one_token_is_the_feedback_of_the_operator():
    """With a batch of one unit key the update of d is that of `hypergradient_preconditioner`, at any state."""
    rng = np.random.default_rng(1)
    k = unit(rng.normal(size=(1, 1, 8)))
    keys, values = heads(k, rng.normal(size=(1, 1, 4)))
    expected = ops.hypergradient_preconditioner(jnp.tile(keys, (1, 5, 1, 1)), eta=0.5, initial=0.2)[1][0, 0]
    _, d = descend(keys, values, 0.5, jnp.full(8, 0.2), steps=5)
    np.testing.assert_allclose(d, expected, rtol=1e-9)


def test_token_by_token_only_the_product_of_ratios_is_faster_than_geometric():
    """The same feedback one token at a time: log q falls from quarter to quarter, but the loss slows down."""
    rng = np.random.default_rng(2)
    k = unit_keys(rng, (4, 1200, SIZE), condition=100.0)
    v = np.einsum("btk,bkv->btv", k, rng.normal(size=(4, SIZE, SIZE)))
    beta = np.ones(k.shape[:2])
    (keys,) = heads(k)
    d, _ = ops.hypergradient_preconditioner(keys, **ops.hypergradient_preset("paper"))
    before, after = residuals(k, v, beta, np.asarray(d[:, :, 0]) * k)
    loss = np.log(np.sum(before**2, axis=-1))
    ratio = np.log(np.sum(after**2, axis=-1)) - loss
    quarters = lambda x: np.mean(x.reshape(4, 4, 300), axis=(0, 2))
    assert np.all(np.diff(quarters(ratio)) < 0)
    digits = -np.diff(quarters(loss))
    assert np.all(digits > 0)
    assert digits[-1] < 0.5 * digits[0]
