"""Sequences of unit keys under which a rule's state explodes although 0 ≤ β⟨w, k⟩ ≤ 2: docs/theory.md, "Blow-ups".

They were found by hill climbing over the keys and gates of a cycle of tokens. Every run starts from the identity and
writes values of zero, so its state is the product of the transitions.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax import ops
from support.theory import heads, spectral_norm, transition, unit, unit_keys

pytestmark = pytest.mark.usefixtures("float64")

TOKENS = 1000


def at(*degrees):
    """Return keys of length 1 in the plane, [T, 2]."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=-1)


def cycle(x):
    """Repeat the tokens of a cycle, [T, ...], to a batch of one sequence of about TOKENS tokens."""
    x = np.asarray(x, dtype=np.float64)
    return np.concatenate([x] * (TOKENS // len(x)))[None]


def start(size):
    return jnp.eye(size)[None, None]


def growth(state):
    return float(np.linalg.norm(np.asarray(state.recurrent[0, 0]), 2))


def path(d):
    """Return Σ_t max_i |log d_{t+1,i} − log d_{t,i}| of multipliers [T, K]."""
    return np.sum(np.max(np.abs(np.diff(np.log(d), axis=0)), axis=-1))


def is_contraction(d, k, beta):
    """Return True if every write contracts in the norm of D^-1/2, with its d."""
    step = beta * np.sum(d * k**2, axis=-1)
    return bool(np.all((step >= 0) & (step <= 2)))


def test_two_keys_and_a_forgetful_hypergradient():
    """Keys at 14 and 76 degrees, β = 1, all of d forgotten at each token, so that d is the square of the last key."""
    k = cycle(at(14, 76))
    q, beta = heads(k, np.ones((1, TOKENS)))
    settings = ops.hypergradient_preset("paper") | {"log_forget": jnp.full((1, TOKENS, 1), -jnp.inf)}
    _, state = ops.osdn(q, q, jnp.zeros_like(q), beta=beta, initial_state=start(2), **settings)
    assert 3e25 < growth(state) < 5e25
    d = np.asarray(ops.hypergradient_preconditioner(q, **settings)[0][0, :, 0])
    assert is_contraction(d, k[0], 1.0)
    assert np.log(growth(state)) < path(d[1:]) / 2 + np.log(np.sqrt(np.max(d[-1]) / np.min(d[1])))


@pytest.mark.parametrize("forget", [0.5, 0.9, 0.999])
def test_the_same_keys_with_a_longer_memory(forget):
    """From a constant factor of 0.5 on, d changes too little between the two keys."""
    q, beta, log_forget = heads(cycle(at(14, 76)), np.ones((1, TOKENS)), np.full((1, TOKENS), np.log(forget)))
    _, state = ops.osdn(q, q, jnp.zeros_like(q), beta=beta, initial_state=start(2), log_forget=log_forget)
    assert growth(state) < 2


def test_two_keys_and_d_between_the_bounds_of_trust():
    """Two keys of unit length, d alternating between the corners of [2/3, 3/2]: ⟨w, k⟩ is 0.95 at every token."""
    k, d = cycle(at(36, 54)), cycle([[2 / 3, 3 / 2], [3 / 2, 2 / 3]])
    assert is_contraction(d[0], k[0], 1.0)
    norm = spectral_norm(transition(k, d * k, np.ones((1, TOKENS))))[0]
    assert 1e30 < norm < 1e31
    assert np.log(norm) < path(d[0]) / 2 + np.log(1.5)


@pytest.mark.parametrize(("open_gate", "expected"), [(1.0, 1e59), (0.95, 5e49)])
def test_erase_gates_of_gdn2(open_gate, expected):
    """Three keys, each erased through one channel alone, by ops.gdn2 with erase gates of 0 and 1, or 0.05 and 0.95."""
    k = cycle(unit(np.array([[0.653, -0.567, -0.503], [0.504, 0.649, -0.570], [0.566, 0.503, 0.653]])))
    gates = np.where([[0, 0, 1], [1, 0, 0], [0, 1, 0]], open_gate, 1 - open_gate)
    q, erase = heads(k, cycle(gates))
    _, state = ops.gdn2(
        q,
        q,
        jnp.zeros_like(q),
        erase_gate=erase,
        write_gate=jnp.ones_like(q),
        log_decay=jnp.zeros_like(q),
        initial_state=start(3),
    )
    assert expected < growth(state) < 2 * expected
    assert growth(state) < (2 / math.sqrt(3)) ** TOKENS  # the limit of any keys and gates


def test_gates_of_pdn():
    """A Gram that remembers one token: tokens with β = 0 set d, those between them write; x = 1.5, β x ≤ 2."""
    k = cycle(at(144, 90, 126.5, 180))
    decay, gain, beta = (cycle(x) for x in ([1, 0, 1, 0], [0, 1, 0, 0.84], [1, 0, 1, 0]))
    with np.errstate(divide="ignore"):
        q, log_decay, gain, beta = heads(k, np.log(decay), gain, beta)
    gates = {"gram_log_decay": log_decay, "gram_gain": gain, "center": -4.43, "squash": 1.5}
    _, state = ops.pdn(q, q, jnp.zeros_like(q), beta=beta, initial_state=start(2), **gates)
    assert 1e12 < growth(state) < 1.3e12


def test_gates_of_beta_aware_osdn():
    """d follows 1/β: tokens with a small β raise one channel of d, those with β near 1 write (η = 1, no forgetting)."""
    k = cycle(at(91.2, 148.8, 158.6, 142.5, 90.6, 90.5))
    q, beta = heads(k, cycle([0.153, 1, 1, 1, 0.16, 0.156]))
    _, state = ops.osdn(q, q, jnp.zeros_like(q), beta=beta, beta_aware=True, initial_state=start(2))
    assert 3e8 < growth(state) < 6e8


@pytest.mark.parametrize(("eta", "low", "high"), [(0.003, 0, 1), (1.9, 0, 1), (40.0, 1e12, 1e13)])
def test_bounds_do_not_help_at_a_large_step_size(eta, low, high):
    """Within (2/3, 3/2) and without β in the feedback: tokens with β = 0 move d to the other corner if η is large."""
    k = cycle(at(129.4, 90, 141, 153, 90, 127.3))
    q, beta = heads(k, cycle([0, 0, 1, 1, 0, 1]))
    settings = ops.hypergradient_preset("trust") | {"eta": eta, "initial": 0.8}
    _, state = ops.osdn(q, q, jnp.zeros_like(q), beta=beta, initial_state=start(2), **settings)
    assert low < growth(state) < high


def test_random_keys_do_not():
    """Independent random keys and gates: none of these rules lets the state grow, in 20 sequences of 16 channels."""
    rng = np.random.default_rng(0)
    shape = (20, 500, 16)
    k = unit_keys(rng, shape, condition=100.0)
    q, beta, gain, forget = heads(k, *(rng.uniform(0, 1, size=shape[:2]) for _ in range(3)))
    erase, log_gain, log_forget = heads(rng.uniform(0, 1, size=shape))[0], jnp.log(gain), jnp.log(forget)
    run = {"initial_state": jnp.tile(start(16), (20, 1, 1, 1)), "implementation": "scan"}
    zero = jnp.zeros_like(q)
    states = [
        ops.osdn(q, q, zero, beta=beta, beta_aware=True, log_forget=log_forget, **run)[1],
        ops.pdn(q, q, zero, beta=beta, gram_log_decay=log_gain, gram_gain=gain, **run)[1],
        ops.gdn2(q, q, zero, erase_gate=erase, write_gate=jnp.ones_like(q), log_decay=zero, **run)[1],
    ]
    assert max(np.max(spectral_norm(np.asarray(state.recurrent))) for state in states) < 2
