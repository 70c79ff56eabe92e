"""Mixtures of experts: routing and outputs against loops in NumPy, gradients, and the balance loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import MixtureConfig, MixtureOfExperts
from osdn_jax.nn.experts import block_size, blocks_of
from osdn_jax.nn.split import split_model
from support import assert_close, jit, random_like

B, T, D = 2, 9, 8
SOFTMAX = MixtureConfig(experts=6, active=2, hidden=5)
SIGMOID = MixtureConfig(experts=6, active=3, hidden=5, router="sigmoid", groups=3, active_groups=2, scale=2.4)
CONFIGS = {
    "softmax": SOFTMAX,
    "not renormalised, one expert": dataclasses.replace(SOFTMAX, active=1, renormalize=False),
    "all experts": dataclasses.replace(SOFTMAX, active=6),
    "shared with a gate": dataclasses.replace(SOFTMAX, shared_hidden=4, shared_gate=True),
    "sigmoid with groups": SIGMOID,
    "sigmoid, shared, not renormalised": MixtureConfig(
        experts=5, active=2, hidden=3, router="sigmoid", renormalize=False, shared_hidden=7
    ),
}


def made(config, seed=0):
    apply, parameters = split_model(MixtureOfExperts(config, D, 1, jnp.float32, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    moved = {name: x + jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype) for name, x in parameters.items()}
    return apply, moved, jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x, gate_and_up, down):
    gate, up = np.split(x @ gate_and_up, 2)
    return (gate * sigmoid(gate) * up) @ down


def routed(config, p, x):
    """Return {expert: weight} of one token, step by step."""
    logits = x @ p["router/kernel"]
    if config.router == "softmax":
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        choice = scores
    else:
        scores = sigmoid(logits)
        choice = scores + p["router_bias"]
        size = config.experts // config.groups
        ranks = [np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(config.groups)]
        best = np.argsort(ranks)[-config.active_groups :]
        choice = np.where(np.isin(np.arange(config.experts) // size, best), choice, -np.inf)
    chosen = np.argsort(choice)[-config.active :]
    total = scores[chosen].sum() if config.renormalize else 1
    return {e: config.scale * scores[e] / total for e in chosen}


def reference(config, parameters, x):
    p = {name: np.asarray(y, np.float64) for name, y in parameters.items()}
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:2]):
        token = np.asarray(x[place], np.float64)
        for expert, weight in routed(config, p, token).items():
            out[place] += weight * swiglu(token, p["experts_gate_and_up"][expert], p["experts_down"][expert])
        if config.shared_hidden:
            shared = swiglu(token, p["shared/gate_and_up/kernel"], p["shared/down/kernel"])
            out[place] += shared * (sigmoid(token @ p["shared_gate/kernel"]) if config.shared_gate else 1)
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_a_loop(name):
    config = CONFIGS[name]
    apply, parameters, x = made(config)
    out = jit(apply)(parameters, x)
    np.testing.assert_allclose(out, reference(config, parameters, x), atol=2e-5)
    one = jit(apply)(parameters, x[:1, :1])  # a step: blocks of one row
    np.testing.assert_allclose(one[0, 0], out[0, 0], atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_all_experts_at_once(name):
    """The same sum computed with every expert for every token, whose gradient is JAX's own."""
    config = CONFIGS[name]
    apply, parameters, x = made(config)

    def dense(parameters, x):
        routing = apply(parameters, x, method="route")
        weights = jnp.zeros((B, T, config.experts))
        for slot in range(config.active):
            weights += routing.weights[..., slot, None] * jax.nn.one_hot(routing.experts[..., slot], config.experts)
        gate, up = jnp.split(jnp.einsum("btd,edf->btef", x, parameters["experts_gate_and_up"]), 2, axis=-1)
        each = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, parameters["experts_down"])
        out = jnp.einsum("bted,bte->btd", each, weights)
        if config.shared_hidden:
            gate, up = jnp.split(x @ parameters["shared/gate_and_up/kernel"], 2, axis=-1)
            shared = (jax.nn.silu(gate) * up) @ parameters["shared/down/kernel"]
            out += shared * (jax.nn.sigmoid(x @ parameters["shared_gate/kernel"]) if config.shared_gate else 1.0)
        return out

    cotangent = random_like(x, seed=3)
    got, want = (
        jit(jax.grad(lambda p, x, f=f: jnp.vdot(f(p, x), cotangent), argnums=(0, 1)))(parameters, x)
        for f in (apply, dense)
    )
    assert_close(got, want, 1e-5)
    used = {n for n, g in got[0].items() if np.any(np.asarray(g))}
    assert used == set(parameters) - {"router_bias"}  # which takes part in the choice only


def test_a_token_that_is_not_finite_reaches_no_other():
    apply, parameters, x = made(SOFTMAX)
    out = jit(apply)(parameters, x.at[0, 3].set(jnp.nan))
    assert np.isnan(out[0, 3]).all()
    assert np.isfinite(np.delete(np.asarray(out).reshape(-1, D), 3, axis=0)).all()


def test_no_tokens():
    apply, parameters, x = made(SOFTMAX)
    assert apply(parameters, x[:, :0]).shape == (B, 0, D)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_balance_is_one_for_equal_shares_and_more_for_a_favourite(router):
    config = MixtureConfig(experts=4, active=1, hidden=3, router=router)
    apply, parameters, _ = made(config)
    even = jnp.concatenate([jnp.eye(4), jnp.eye(4)]).reshape(1, 8, 4) * 9
    x = jnp.pad(even, ((0, 0), (0, 0), (0, D - 4)))
    kernel = jnp.zeros((D, 4)).at[:4].set(jnp.eye(4))
    parameters |= {"router/kernel": kernel}
    if router == "sigmoid":
        parameters["router_bias"] = jnp.zeros(4)
    np.testing.assert_allclose(apply(parameters, x, method="route").balance, 1.0, rtol=1e-5)
    favourite = apply(parameters, x.at[..., 0].add(20.0), method="route").balance
    assert favourite > 1.3
    slope = jax.grad(lambda k: apply(parameters | {"router/kernel": k}, x.at[..., 0].add(1.0), method="route").balance)
    assert np.abs(np.asarray(slope(kernel))).max() > 0


@pytest.mark.parametrize(("assignments", "experts", "size"), [(1, 4, 1), (64, 4, 8), (10**6, 4, 256), (10, 512, 1)])
def test_sizes_of_blocks(assignments, experts, size):
    assert block_size(assignments, experts) == size


def test_blocks_have_every_assignment_once_and_one_expert_each():
    experts = jnp.asarray(np.random.default_rng(0).integers(5, size=37), jnp.int32)  # 4 is no expert
    blocks = blocks_of(experts, 4, 4)
    row = np.asarray(blocks.row)
    inside = row < 37
    assert sorted(row[inside]) == [i for i in range(37) if experts[i] < 4]
    for number, block in enumerate(row.reshape(-1, 4)):
        assert {int(experts[i]) for i in block[block < 37]} <= {int(blocks.expert[number])}
        assert (block < 37).any() == (number < int(blocks.number))
    for assignment, place in enumerate(np.asarray(blocks.place)):
        assert row[place] == assignment if experts[assignment] < 4 else place == row.size


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"active": 7}, "active: got 7, expected at most the 6 experts"),
        ({"router": "hash"}, "router: got 'hash'"),
        ({"groups": 4}, "groups: got 4, expected a divisor of the 6 experts"),
        ({"groups": 3}, "groups: got 3 with router='softmax', expected 1"),
        ({"router": "sigmoid", "groups": 3, "active_groups": 4}, "active_groups: got 4"),
        ({"router": "sigmoid", "groups": 6, "active": 2}, "active: got 2, expected at most the 1 experts"),
        ({"shared_gate": True}, "shared_gate: got True with shared_hidden=0"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"experts": 0}, "experts: got 0"),
        ({"shared_hidden": -1}, "shared_hidden: got -1"),
    ],
)
@pytest.mark.usefixtures("our_checks")
def test_a_mixture_names_the_field_that_is_wrong(changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SOFTMAX, **changes)
