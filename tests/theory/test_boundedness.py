"""The state of a preconditioned delta rule stays bounded, and when: docs/theory.md, "Boundedness"."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support.theory import SIZES, heads, one_hot_keys, spectral_norm, transition, unit, unit_keys

pytestmark = pytest.mark.usefixtures("float64")


# How log d changes from token to token.
STEPS = {
    "of each channel": lambda rng, shape: 0.01 * rng.normal(size=shape),
    "of all together": lambda rng, shape: 0.3 * rng.normal(size=(*shape[:2], 1)) * np.ones(shape),
    "jumps": lambda rng, shape: rng.normal(size=shape) * (rng.uniform(size=(*shape[:2], 1)) < 0.05),
}


def decays(kind, rng, shape):
    if kind == "none":
        return None
    return -rng.exponential(0.02, size=shape if kind == "channel" else shape[:2])


def scaled(matrices, d):
    """Return D^-1/2 times each matrix."""
    return matrices / np.sqrt(d)[..., :, None]


def growths(d):
    """Return (½ Σ max_i log(d_t / d_{t+1}), ½ Σ max_i |log d_{t+1} − log d_t|) of multipliers [B, T, K]."""
    steps = np.diff(np.log(d), axis=1)
    return np.sum(np.max(-steps, axis=-1), axis=1) / 2, np.sum(np.max(np.abs(steps), axis=-1), axis=1) / 2


def settled(rng, k, d):
    """Return beta [B, T] with 0 ≤ β⟨d, k²⟩ ≤ 2, on both limits at some tokens."""
    step = rng.uniform(0, 2, size=k.shape[:2])
    step[:, ::5], step[:, 1::7] = 2.0, 0.0
    return step / np.sum(d * k**2, axis=-1)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_a_fixed_diagonal_contracts(decay):
    """In the norm of D^-1/2 no sequence of keys makes the state grow while 0 ≤ β⟨Dk, k⟩ ≤ 2, with any decay."""
    for size, _, tokens in SIZES:
        rng = np.random.default_rng(size)
        shape = (6, tokens, size)
        d = np.exp(rng.normal(size=size))
        k = unit_keys(rng, shape, condition=30.0) * rng.uniform(0.1, 3, size=shape[:2])[..., None]
        start = np.broadcast_to(np.diag(np.sqrt(d)), (6, size, size))  # D^-1/2 S = I
        state = transition(k, d * k, settled(rng, k, d), decays(decay, rng, shape), start)
        assert np.all(spectral_norm(scaled(state, d)) <= 1 + 1e-12)


def test_the_plain_norm_may_grow():
    """So D^-1/2 is needed: in the norm of S itself, one write can grow the state by up to the condition of D^1/2."""
    d = np.array([4.0, 0.25])
    k = np.array([[[0.25, 1.0]]])
    state = transition(k, d * k, 1 / np.sum(d * k**2, axis=-1))
    assert spectral_norm(state)[0] > 1.5
    assert spectral_norm(scaled(state * np.sqrt(d), d))[0] < 1 + 1e-12


def test_beyond_two_a_repeated_key_grows():
    rng = np.random.default_rng(0)
    d = np.exp(rng.normal(size=8))
    k = np.tile(unit(rng.normal(size=(1, 1, 8))), (1, 40, 1))
    for step, grows in ((1.999, False), (2.1, True)):
        state = transition(k, d * k, step / np.sum(d * k**2, axis=-1), start=np.diag(np.sqrt(d))[None])
        assert (spectral_norm(scaled(state, d))[0] > 10) == grows


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
@pytest.mark.parametrize("changes", STEPS)
def test_a_changing_diagonal(changes, decay):
    """The growth of D_t^-1/2 S_t is at most exp(½ Σ max_i log(d_t / d_{t+1})), and so at most exp(path / 2)."""
    for size, _, tokens in SIZES[:2]:
        rng = np.random.default_rng(size)
        shape = (8, tokens, size)
        d = np.exp(np.cumsum(STEPS[changes](rng, shape), axis=1))
        k = unit_keys(rng, shape)
        start = np.sqrt(d[:, 0, :, None]) * np.eye(size)
        state = transition(k, d * k, settled(rng, k, d), decays(decay, rng, shape), start)
        norm = np.log(spectral_norm(scaled(state, d[:, -1])))
        signed, path = growths(d)
        assert np.all(norm <= signed + 1e-9)
        assert np.all(signed <= path + 1e-9)


def test_the_growth_is_reached():
    """With nothing written, a channel whose d falls grows by exactly sqrt(d_t / d_{t+1}) in this norm."""
    d = np.exp(-0.1 * np.arange(50))[None, :, None] * np.ones(3)
    k = unit_keys(np.random.default_rng(0), d.shape)
    state = transition(k, d * k, np.zeros((1, 50)), start=np.diag(np.sqrt(d[0, 0]))[None])
    signed, path = growths(d)
    np.testing.assert_allclose(np.log(spectral_norm(scaled(state, d[:, -1]))), signed, rtol=1e-9)
    np.testing.assert_allclose(signed, path)


def test_writes_add_their_own_length():
    """Values add at most sqrt(2 β_t)|v_t| each, times the growth after them: linear in the tokens for a fixed D."""
    rng = np.random.default_rng(1)
    for size, value_size, tokens in SIZES:
        d = np.exp(rng.normal(size=size))
        k = unit_keys(rng, (2, tokens, size))
        v = rng.normal(size=(2, tokens, value_size))
        beta = settled(rng, k, d)
        q, values, strength, w = heads(k, v, beta, d * k)
        _, state = ops.delta_rule(q, q, values, strength, write_key=w)
        bound = np.sum(np.sqrt(2 * beta) * np.linalg.norm(v, axis=-1), axis=-1)
        assert np.all(spectral_norm(scaled(np.asarray(state[:, 0]), d)) <= bound)


def osdn(k, beta, settings):
    """Return (norm of the product of transitions, d before each token [B, T, K])."""
    q, strength = heads(k, beta)
    size = k.shape[-1]
    identity = jnp.tile(jnp.eye(size)[None, None], (len(k), 1, 1, 1))
    _, state = ops.osdn(q, q, jnp.zeros_like(q), beta=strength, initial_state=identity, **settings)
    d, _ = ops.hypergradient_preconditioner(
        q, **{name: x for name, x in settings.items() if name in ("eta", "bounds", "initial", "anchor", "log_forget")}
    )
    return spectral_norm(np.asarray(state.recurrent[:, 0])), np.asarray(d[:, :, 0])


@pytest.mark.parametrize("keys", ["random", "one-hot", "two alternating"])
def test_the_own_d_of_osdn_cannot_grow_exponentially(keys):
    """Unit keys, b = 1, no forgetting, η < 2/max|u|², d ≥ lo: the growth is at most exp(C/2 + η sqrt(C T) / (2 lo))."""
    rng = np.random.default_rng(2)
    tokens, size = 800, 6
    k = {
        "random": lambda: unit_keys(rng, (8, tokens, size)),
        "one-hot": lambda: one_hot_keys(rng, (8, tokens, size)),
        "two alternating": lambda: np.tile(unit_keys(rng, (8, 2, size)), (1, tokens // 2, 1)),
    }[keys]()
    for eta, lo, hi in ((0.003, 2 / 3, 3 / 2), (1.0, 2 / 3, 3 / 2), (1.5, 0.1, 10.0)):
        first = rng.uniform(lo, min(hi, 3), size=(1, size))
        settings = {"eta": eta, "bounds": (lo, hi), "initial": jnp.asarray(first)}
        norm, d = osdn(k, rng.uniform(0, 1, size=(8, tokens)), settings)
        constant = np.sum((first - 1) ** 2) / (eta * (2 - eta * np.max(np.sum(k**4, axis=-1))))
        _, path = growths(d)
        assert np.all(path <= eta / (2 * lo) * math.sqrt(constant * tokens))
        conversion = np.sqrt(np.max(d[:, -1], axis=-1) / np.min(d[:, 0], axis=-1))
        assert np.all(norm <= conversion * np.exp(constant / 2 + path))


def test_forgetting_toward_one_bounds_the_path():
    """With a constant factor g < 1 and the anchor 1 the path is at most (|d_0 − 1| / lo)(1 + η / (1 − g))."""
    rng = np.random.default_rng(3)
    k = unit_keys(rng, (4, 2000, 8))
    g, eta, lo = 0.9, 1.0, 0.5
    first = rng.uniform(0.5, 1.5, size=(1, 8))
    forget = jnp.full((4, 2000, 1), np.log(g))
    settings = {"eta": eta, "bounds": (lo, 2.0), "initial": jnp.asarray(first), "anchor": 1.0, "log_forget": forget}
    _, d = osdn(k, rng.uniform(0, 1, size=(4, 2000)), settings)
    _, half_path = growths(d)
    assert np.all(2 * half_path <= np.linalg.norm(first - 1) / lo * (1 + eta / (1 - g)))


def test_fixed_erase_gates_of_gdn2_contract():
    """An erase gate that does not change is the diagonal 1 / gate: the state contracts in the norm of gate^1/2."""
    for size, _, tokens in SIZES:
        rng = np.random.default_rng(size)
        gate = rng.uniform(0.05, 1, size=size)
        k = unit_keys(rng, (4, tokens, size))
        start = np.broadcast_to(np.diag(gate**-0.5), (4, size, size))
        state = transition(gate * k, k, np.ones((4, tokens)), decays("channel", rng, k.shape), start)
        assert np.all(spectral_norm(scaled(state, 1 / gate)) <= 1 + 1e-12)


def test_one_token_of_gdn2_grows_the_state_by_no_more_than_two_over_root_three():
    """‖I − k (b ⊙ k)ᵀ‖ ≤ 2/√3 for unit k and gates b in [0, 1], and this is the smallest such number."""
    rng = np.random.default_rng(4)
    for size in (2, 8, 32):
        k = unit_keys(rng, (400, 1, size), condition=rng.choice([1.0, 10.0]))
        gate = rng.uniform(0, 1, size=k.shape) ** rng.choice([0.1, 1.0, 10.0], size=(400, 1, 1))
        assert np.all(spectral_norm(transition(gate * k, k, np.ones((400, 1)))) <= 2 / math.sqrt(3))
    k = np.sqrt([[[1 / 3, 2 / 3]]])
    worst = transition(np.array([1.0, 0.0]) * k, k, np.ones((1, 1)))
    np.testing.assert_allclose(spectral_norm(worst), 2 / math.sqrt(3), rtol=1e-12)
