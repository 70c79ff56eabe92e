"""The rules of the bench: each is the rule of `osdn_jax.ops` that it stands for, or what its definition says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from osdn_jax.regression import RULES, Condition, Rule, draw, measure_rule
from osdn_jax.regression.write_keys import gram_multiplier

pytestmark = pytest.mark.usefixtures("float64")

B, T, K = 2, 40, 6
WIDE = (0.0, 1e9)
TRUST = {"eta": 0.003, "bounds": (2 / 3, 3 / 2), "initial": 1.0}


def inputs(*, unit=True, seed=0):
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((B, T, 1, K)) * np.logspace(0, -1, K)
    if unit:
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, beta = rng.standard_normal((B, T, 1, K)), rng.uniform(0.2, 1.0, (B, T, 1))
    return jnp.asarray(k), jnp.asarray(v), jnp.asarray(beta)


def gates(k, decay, value=1.0):
    return {"gram_log_decay": jnp.full(k.shape[:3], decay), "gram_gain": jnp.full(k.shape[:3], value)}


def forgetting(k, factor):
    return jnp.full(k.shape[:3], math.log(factor))


MEMORY = math.log(0.99)
CENTER = math.log(100 / K)
EQUALS = {
    "delta_net": lambda k, v, beta: ops.delta_net(k, k, v, beta=beta),
    "osdn_paper": lambda k, v, beta: ops.osdn(k, k, v, beta=beta),
    "osdn_ones": lambda k, v, beta: ops.osdn(k, k, v, beta=beta, initial=1.0),
    "osdn_ones_0.1": lambda k, v, beta: ops.osdn(k, k, v, beta=beta, initial=1.0, eta=0.1),
    "osdn_ones_beta": lambda k, v, beta: ops.osdn(k, k, v, beta=beta, initial=1.0, beta_aware=True),
    "osdn_trust": lambda k, v, beta: ops.osdn(k, k, v, beta=beta, **TRUST),
    "osdn_trust_beta": lambda k, v, beta: ops.osdn(k, k, v, beta=beta, beta_aware=True, **TRUST),
    "apf_0": lambda k, v, beta: ops.osdn(k, k, v, beta=beta, log_forget=forgetting(k, 0.99)),
    "apf_1": lambda k, v, beta: ops.osdn(k, k, v, beta=beta, log_forget=forgetting(k, 0.99), anchor=1.0),
    "pdn_paper": lambda k, v, beta: ops.pdn(k, k, v, beta=beta, **gates(k, 0.0)),
    "pdn_1.5": lambda k, v, beta: ops.pdn(k, k, v, beta=beta, center=CENTER, **gates(k, MEMORY)),
    "pdn_2": lambda k, v, beta: ops.pdn(k, k, v, beta=beta, center=CENTER, squash=2.0, **gates(k, MEMORY)),
    "pdn_4": lambda k, v, beta: ops.pdn(k, k, v, beta=beta, center=CENTER, squash=4.0, **gates(k, MEMORY)),
    "gated_delta_net": lambda k, v, beta: ops.gated_delta_net(k, k, v, beta=beta, log_decay=forgetting(k, 0.999)),
    "pgdn_2": lambda k, v, beta: ops.pgdn(
        k, k, v, beta=beta, log_decay=forgetting(k, 0.999), center=CENTER, squash=2.0, **gates(k, MEMORY)
    ),
}


@pytest.mark.parametrize("name", EQUALS)
def test_rules_equal_those_of_ops(name):
    """The outputs of the delta rule under the bench's write keys are those of the named rule."""
    k, v, beta = inputs()
    rule = RULES[name]
    log_decay = jnp.full(beta.shape, rule.log_decay) if rule.log_decay else None
    out, state = ops.delta_rule(k, k, v, beta, write_key=rule.write_key(k, beta), log_decay=log_decay)
    expected, expected_state = EQUALS[name](k, v, beta)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state, expected_state.recurrent, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.reads_beta])
def test_only_rules_that_say_so_read_beta(name):
    k, _, beta = inputs()
    told = [k**2] if RULES[name].told else []
    both = [RULES[name].write_key(k, b, *told) for b in (beta, 0.5 * beta)]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("name", ["osdn_ones", "osdn_ones_0.1", "osdn_trust", "unit_step", "mean_step", "scale_only"])
def test_rules_that_are_delta_net_on_unit_keys(name):
    k, _, beta = inputs()
    np.testing.assert_allclose(RULES[name].write_key(k, beta), k, rtol=1e-12)


@pytest.mark.parametrize("name", ["unit_step", "pdn_unit_step"])
def test_steps_of_one(name):
    k, _, beta = inputs(unit=False)
    np.testing.assert_allclose(jnp.sum(RULES[name].write_key(k, beta) * k, -1), 1.0, rtol=1e-12)


@pytest.mark.parametrize(("name", "pdn"), [("matched_1.5", "pdn_1.5"), ("matched_2", "pdn_2")])
def test_matched_rules_have_the_step_of_pdn_and_the_direction_of_the_key(name, pdn):
    k, _, beta = inputs(unit=False)
    matched, other = (RULES[n].write_key(k, beta) for n in (name, pdn))
    np.testing.assert_allclose(jnp.sum(matched * k, -1), jnp.sum(other * k, -1), rtol=1e-12)
    direction = matched / k
    np.testing.assert_allclose(direction, jnp.broadcast_to(direction[..., :1], k.shape), rtol=1e-12)


def test_told_rules():
    k, _, beta = inputs()
    moment = jnp.broadcast_to(jnp.asarray([0.5, 0.3, 0.1, 0.05, 0.03, 0.02]), k.shape)
    d = RULES["told_diagonal"].write_key(k, beta, moment) / k
    np.testing.assert_allclose(jnp.sum(d * moment, -1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(d[0, 0, 0] / d[0, 0, 0, 0], (moment[0, 0, 0] / 0.5) ** -0.5, rtol=1e-12)
    np.testing.assert_allclose(RULES["told_scale"].write_key(k, beta, 3.0 * moment), k / 3.0, rtol=1e-12)


def loop(name, k, eta):
    """Write keys of the compositions, a token at a time in NumPy."""
    k = np.asarray(k)[:, :, 0]
    m = np.asarray(gram_multiplier(jnp.asarray(k)[:, :, None], 2.0))[:, :, 0]
    out = np.empty_like(k)
    for b in range(len(k)):
        d, past = np.ones(K), []
        for t in range(T):
            u = k[b, t] ** 2
            if name == "key":
                seen = u
            elif name == "write":
                seen = m[b, t] * u
            else:
                seen = np.full(K, (m[b, t] * u).sum() / K)  # every channel holds the scalar: <s, seen> = s a
            past.append((m[b, t] * u).sum())
            if name == "mean":
                weights = 0.99 ** np.arange(len(past))[::-1]
                out[b, t] = m[b, t] * k[b, t] * weights.sum() / (weights * past).sum()
                continue
            out[b, t] = d * m[b, t] * k[b, t]
            gradient = seen * (K if name == "scale" else 1)
            d = np.clip(d + eta * (1 - d @ seen) * gradient, 0, 1e9)
    return out


@pytest.mark.parametrize(
    ("rule", "name", "eta"),
    [
        ("key_feedback", "key", 1.0),
        ("write_feedback", "write", 1.0),
        ("write_feedback_0.1", "write", 0.1),
        ("scale_feedback", "scale", 1.0),
        ("scale_feedback_0.1", "scale", 0.1),
        ("pdn_mean_step", "mean", None),
    ],
)
def test_compositions_against_a_loop(rule, name, eta):
    k, _, beta = inputs(unit=False)
    found = RULES[rule].write_key(k, beta)[:, :, 0]
    np.testing.assert_allclose(found, loop(name, k, eta), rtol=1e-9, atol=1e-12)


def test_the_exact_gram_is_ridge_regression():
    drawn = draw(Condition("x", 10, width=6, length=30), 2)
    end = measure_rule(RULES["exact_gram"], drawn, [1.0]).end[0]
    for k, v, asked, answers, found in zip(drawn.k, drawn.v, drawn.asked, drawn.answers, end, strict=True):
        w = np.linalg.solve(1e-3 * np.eye(6) + k.T @ k, k.T @ v)
        np.testing.assert_allclose(found, np.mean(np.sum((answers - asked @ w) ** 2, -1)), rtol=1e-6)


def test_rules_that_are_told_nothing_of_the_future():
    """A write key does not change with later tokens."""
    k, _, beta = inputs(unit=False)
    for name, rule in RULES.items():
        told = [jnp.ones_like(k)] if rule.told else []
        whole, part = rule.write_key(k, beta, *told), rule.write_key(k[:, :9], beta[:, :9], *(x[:, :9] for x in told))
        np.testing.assert_allclose(whole[:, :9], part, rtol=1e-9, atol=1e-12, err_msg=name)


def test_wrong_rules():
    with pytest.raises(ValueError, match="got none of write_key and run"):
        Rule()
    with pytest.raises(ValueError, match="got both of write_key and run"):
        Rule(write_key=jax.nn.relu, run=jax.nn.relu)
    with pytest.raises(ValueError, match="log_decay: got 1, expected at most 0"):
        Rule(write_key=jax.nn.relu, log_decay=1)
