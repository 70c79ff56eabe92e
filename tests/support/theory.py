"""Keys with a given spectrum, and what the operator does to residuals and states: for the tests of theorems."""

import jax.numpy as jnp
import numpy as np

from osdn_jax import ops

SIZES = [(3, 2, 17), (16, 5, 65), (64, 64, 200)]  # K, V, tokens


def unit(x):
    """Scale vectors to length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def unit_keys(rng, shape, condition=1.0, rotate=False):
    """Return keys of length 1 whose second moment has about this condition number, on the axes or rotated off them."""
    keys = rng.normal(size=shape) * np.geomspace(1.0, condition**-0.5, shape[-1])
    return unit(keys @ rotation(rng, shape[-1]) if rotate else keys)


def one_hot_keys(rng, shape):
    return np.eye(shape[-1])[rng.integers(0, shape[-1], shape[:-1])]


def heads(*arrays):
    """Return arrays as JAX's, with an axis of one head after batch and time."""
    return tuple(jnp.asarray(x)[:, :, None] for x in arrays)


def residuals(k, v, beta, write_key, log_decay=None, implementation=None):
    """Return (residual before each write, after the decay; residual after it), both [B, T, V], as the operator sees it.

    The first comes from a run in which each token is two: one decays the state and reads it, and one writes.

    Args:
        k, write_key: [B, T, K].
        v: [B, T, V].
        beta: [B, T].
        log_decay: [B, T] or [B, T, K]; default none.
        implementation: of `delta_rule`.
    """

    def left(k, v, beta, w, log_decay):
        q, values, strength, write = heads(k, v, beta, w)
        options = {} if log_decay is None else {"log_decay": heads(log_decay)[0]}
        o, _ = ops.delta_rule(
            q, q, values, strength, write_key=write, scale=1.0, implementation=implementation, **options
        )
        return v - np.asarray(o[:, :, 0])

    def twice(x, first, second):
        return np.stack([first * x, second * x], axis=2).reshape(x.shape[0], -1, *x.shape[2:])

    arrays = [twice(x, 1, 1) for x in (k, v)] + [twice(beta, 0, 1), twice(write_key, 1, 1)]
    before = left(*arrays, None if log_decay is None else twice(log_decay, 1, 0))[:, ::2]
    return before, left(k, v, beta, write_key, log_decay)


def transition(k, write_key, beta, log_decay=None, start=None):
    """Return the product of all transitions of each sequence, later ones on the left, times `start`: [B, K, K].

    Args:
        k, write_key: [B, T, K].
        beta: [B, T].
        log_decay: [B, T] or [B, T, K]; default none.
        start: [B, K, K]; default the identity.
    """
    size = k.shape[-1]
    start = np.broadcast_to(np.eye(size), (len(k), size, size)) if start is None else start
    q, w, values, strength = heads(k, write_key, np.zeros_like(k), beta)
    decay = {} if log_decay is None else {"log_decay": heads(log_decay)[0]}
    initial = jnp.asarray(start)[:, None]
    run = {"initial_state": initial, "implementation": "scan"}  # it compiles fastest
    _, state = ops.delta_rule(q, q, values, strength, write_key=w, **run, **decay)
    return np.asarray(state[:, 0])


def spectral_norm(matrices):
    return np.linalg.norm(matrices, ord=2, axis=(-2, -1))
