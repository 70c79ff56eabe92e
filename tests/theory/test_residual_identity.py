"""A write multiplies the residual of its token by 1 - beta <w, k>: docs/theory.md, "The residual of one token"."""

import numpy as np
import pytest

from osdn_jax import ops
from support.theory import SIZES, heads, residuals, unit_keys

pytestmark = pytest.mark.usefixtures("float64")


def multipliers(kind, rng, k, beta):
    """Return d [B, T, K], the multipliers of the write keys."""
    (keys, strength) = heads(k, beta)
    if kind == "fixed":
        return np.broadcast_to(rng.uniform(0, 3, size=k.shape[-1]), k.shape)
    if kind == "hypergradient":
        d, _ = ops.hypergradient_preconditioner(keys, strength, **ops.hypergradient_preset("paper"))
    else:
        (gain,) = heads(rng.uniform(0, 1, size=beta.shape))
        d, _ = ops.gram_preconditioner(keys, -gain, gain, center=-0.2)
    return np.asarray(d[:, :, 0])


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("kind", ["fixed", "hypergradient", "gram"])
def test_residual_after_each_write(kind, decay):
    """It holds at every token, with the decay before the write counted as part of the state before it."""
    for (size, value_size, tokens), implementation in zip(SIZES[:2], ("scan", "chunk"), strict=True):
        rng = np.random.default_rng(size)
        k = unit_keys(rng, (2, tokens, size), condition=100.0)
        v = rng.normal(size=(2, tokens, value_size))
        beta = rng.uniform(0, 1, size=(2, tokens))
        log_decay = {
            "none": None,
            "scalar": -rng.uniform(0, 1, size=(2, tokens)),
            "channel": -rng.uniform(0, 1, size=k.shape),
        }[decay]
        w = multipliers(kind, rng, k, beta) * k
        before, after = residuals(k, v, beta, w, log_decay, implementation)
        factor = 1 - beta * np.sum(w * k, axis=-1)
        np.testing.assert_allclose(after, factor[..., None] * before, rtol=0, atol=1e-12 * np.max(np.abs(before)))


def test_one_factor_serves_all_values():
    """So the ratio of the losses is the factor squared, whatever the state and the values are."""
    rng = np.random.default_rng(0)
    k = unit_keys(rng, (1, 33, 8))
    d = rng.uniform(0, 2, size=k.shape)
    beta = rng.uniform(0, 1, size=(1, 33))
    factor = 1 - beta * np.sum(d * k**2, axis=-1)
    for scale in (1e-3, 1.0, 1e3):
        before, after = residuals(k, scale * rng.normal(size=(1, 33, 4)), beta, d * k)
        ratio = np.sum(after**2, axis=-1) / np.sum(before**2, axis=-1)
        np.testing.assert_allclose(ratio, factor**2, rtol=1e-9)


def test_a_residual_from_before_the_decay_does_not_obey_it():
    rng = np.random.default_rng(0)
    k = unit_keys(rng, (1, 33, 8))
    v, beta, decay = rng.normal(size=(1, 33, 4)), np.full((1, 33), 0.5), np.full((1, 33), -0.5)
    q, values, strength, log_decay = heads(k, v, beta, decay)
    o, _ = ops.delta_rule(q, q, values, strength, log_decay=log_decay, scale=1.0)
    after = v - np.asarray(o[:, :, 0])
    without = v - np.asarray(o[:, :, 0]) / np.exp(-0.5)  # not the residual of any write
    assert np.linalg.norm(after - 0.5 * without) > 0.1 * np.linalg.norm(after)
