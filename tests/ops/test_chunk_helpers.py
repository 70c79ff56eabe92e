"""Helpers of the chunkwise forms: triangular inverse, decayed scores, splitting into chunks."""

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax.ops import chunks, chunkwise, scores
from osdn_jax.ops.triangular import unit_lower_inverse
from support import assert_close, jit, value_and_gradient
from support.cases import NAMED

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("size", [1, 7, 8, 16, 24, 40])
def test_unit_lower_inverse(size):
    rng = np.random.default_rng(size)
    lower = np.tril(rng.uniform(-0.5, 1, size=(2, 3, size, size)), -1)
    cotangent = rng.normal(size=lower.shape)
    value, gradient = jit(value_and_gradient(unit_lower_inverse))(lower, cotangent)
    inverse = np.linalg.inv(np.eye(size) + lower)
    transposed = inverse.swapaxes(-1, -2)
    assert_close(value, inverse, 1e-12)
    # d(M^-1) = -M^-1 dM M^-1, and only entries below the diagonal are free.
    assert_close(gradient, -np.tril(transposed @ cotangent @ transposed, -1), 1e-12)


def test_unit_lower_inverse_of_nearly_parallel_keys_in_float32():
    """A is 0.95 below the diagonal: its powers reach 1e17 before they vanish, while the inverse is small."""
    lower = np.tril(np.full((64, 64), 0.95), -1).astype(np.float32)
    inverse = np.linalg.inv(np.eye(64) + lower.astype(np.float64))
    assert_close(jit(unit_lower_inverse)(lower), inverse, 1e-6)


def direct_scores(x, w, log_decay):
    """Compute [..., M, C, K], [..., C, K], [..., C, K] -> [..., M, C, C] with one sum per entry."""
    size = w.shape[-2]
    out = np.zeros((*x.shape[:-1], size))
    for i in range(size):
        for j in range(i + 1):
            decay = np.exp(log_decay[..., j + 1 : i + 1, :].sum(-2))
            out[..., i, j] = (x[..., i, :] * (decay * w[..., j, :])[..., None, :]).sum(-1)
    return out


@pytest.mark.parametrize("size", [1, 8, 21, 32])
def test_channel_scores(size):
    rng = np.random.default_rng(size)
    x, w = rng.normal(size=(2, 2, size, 5)), rng.normal(size=(2, size, 5))
    log_decay = rng.choice([0.0, -20.0, -0.1, -1.0], size=w.shape)
    arguments = {"x": x, "w": w, "log_decay": log_decay}
    cotangent = rng.normal(size=(2, 2, size, size))
    program = jit(value_and_gradient(lambda a: scores.channel_scores(**a)))
    value, gradient = program(arguments, cotangent)
    assert_close(value, direct_scores(**arguments), 1e-13)
    # The scores are linear in x and in w, so <gradient, x> = <gradient, w> = <cotangent, scores>.
    total = np.sum(cotangent * direct_scores(**arguments))
    for name in ("x", "w"):
        np.testing.assert_allclose(np.sum(gradient[name] * arguments[name]), total, rtol=1e-12)
    direction = rng.normal(size=log_decay.shape)
    difference = [np.sum(cotangent * direct_scores(x, w, log_decay + h * direction)) for h in (1e-6, -1e-6)]
    got = np.sum(gradient["log_decay"] * direction)
    np.testing.assert_allclose(got, (difference[0] - difference[1]) / 2e-6, rtol=1e-6, atol=1e-7)


def test_sums_and_pair_decay():
    rng = np.random.default_rng(0)
    g = rng.choice([0.0, -20.0, -0.1], size=(2, 9))
    np.testing.assert_allclose(scores.inclusive_sum(jnp.asarray(g)[..., None])[..., 0], np.cumsum(g, -1), rtol=1e-14)
    after = np.stack([g[:, i + 1 :].sum(-1) for i in range(9)], -1)
    np.testing.assert_allclose(scores.suffix_sum(jnp.asarray(g)[..., None])[..., 0], after, rtol=1e-14)
    ones = np.ones((2, 1, 9, 1))
    want = direct_scores(ones, ones[:, 0], g[..., None])[:, 0]
    np.testing.assert_allclose(scores.pair_decay(jnp.asarray(g)), want, rtol=1e-14)


@pytest.mark.parametrize(("length", "size", "fitting"), [(0, 64, 1), (1, 64, 1), (5, 64, 8), (57, 100, 64), (99, 7, 7)])
def test_chunks(length, size, fitting):
    assert chunks.fitting_chunk(size, length) == fitting
    x = jnp.arange(2.0 * length * 3).reshape(2, length, 3)
    split = chunks.to_chunks(x, fitting)
    assert split.shape == (-(-length // fitting), 2, fitting, 3)
    np.testing.assert_array_equal(chunks.from_chunks(split, length), x)


def test_terms_of_all_chunks_computed_before_the_recurrence(monkeypatch):
    """The order of operations on accelerators, which is not used on a CPU."""
    monkeypatch.setattr(chunkwise, "on_cpu", lambda: False)
    case = NAMED["delta: scalar decay, write key per key head"]
    value, gradient = case.value_and_gradient("chunk")
    assert_close(value, case.expected, 1e-12)
    assert_close(gradient, case.by_scan[1], 1e-12)
