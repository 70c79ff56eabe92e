"""The write keys of the built-in rules, each a function of keys [B, T, 1, K] and beta [B, T, 1]."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from osdn_jax import ops

WriteKey = Callable[..., jax.Array]
MEMORY = 100  # tokens that the decayed Gram of `gram` remembers
PAPER_CENTER = -0.2  # initial value in the paper
RIDGE = 1e-3  # of the exact Gram


def plain(k: jax.Array, beta: jax.Array) -> jax.Array:
    """Return the keys: DeltaNet."""
    return k


def hypergradient(*, beta_aware: bool = False, forget: float | None = None, **options: Any) -> WriteKey:
    """Return OSDN's write keys, with the options of `ops.hypergradient_write_key`.

    Args:
        beta_aware: the feedback contains beta.
        forget: factor on d at each token; default none.
        options: eta, initial, bounds, anchor.
    """

    def write_key(k: jax.Array, beta: jax.Array) -> jax.Array:
        log_forget = None if forget is None else jnp.full(beta.shape, np.log(forget), beta.dtype)
        aware = beta if beta_aware else None
        return ops.hypergradient_write_key(k, aware, log_forget=log_forget, **options)[0]

    return write_key


def gram_multiplier(k: jax.Array, squash: float, *, memory: float | None = MEMORY) -> jax.Array:
    """Return PDN's multipliers m, [B, T, 1, K]: w = m k.

    Args:
        k: keys.
        squash: x of the paper, so that m stays within [1/x, x].
        memory: tokens that A remembers, and then m is 1 where A is that of isotropic unit keys in equilibrium: what a
            trained decay and center would have to find. None is the paper's initial value: A decays little (here not)
            and the center is -0.2.
    """
    one = jnp.ones(k.shape[:-1], k.dtype)
    decay = 0.0 if memory is None else float(np.log1p(-1.0 / memory))
    center = PAPER_CENTER if memory is None else float(np.log(memory / k.shape[-1]))
    return ops.gram_preconditioner(k, decay * one, one, center=center, squash=squash)[0]


def gram(squash: float, *, memory: float | None = MEMORY) -> WriteKey:
    """Return PDN's write keys; arguments as of `gram_multiplier`."""
    return lambda k, beta: gram_multiplier(k, squash, memory=memory) * k


def matched(squash: float) -> WriteKey:
    """Return keys scaled so that the step <w, k> is PDN's at every token: PDN's damping without its curvature."""

    def write_key(k: jax.Array, beta: jax.Array) -> jax.Array:
        return k * _ratio(_dot(gram_multiplier(k, squash), jnp.square(k)), _dot(k, k))

    return write_key


def told_diagonal(k: jax.Array, beta: jax.Array, second_moment: jax.Array) -> jax.Array:
    """Return d k with d_i = (E k_i^2)^-1/2, scaled so that E <d, k^2> = 1: the distribution is known in advance."""
    root = jnp.sqrt(second_moment)
    return k / (root * jnp.sum(root, axis=-1, keepdims=True))


def told_scale(k: jax.Array, beta: jax.Array, second_moment: jax.Array) -> jax.Array:
    """Return k / E |k|^2: the scale is known in advance."""
    return k / jnp.sum(second_moment, axis=-1, keepdims=True)


def exact_gram(k: jax.Array, beta: jax.Array) -> jax.Array:
    """Return the write keys under which beta = 1 is ridge regression."""
    return ops.exact_gram_write_key(k, ridge=RIDGE)[0]


def unit_step(squash: float = 1.0) -> WriteKey:
    """Return m k / <m, k^2>, for which the step <w, k> is 1 at every token; squash 1 is m = 1 (normalised LMS)."""

    def write_key(k: jax.Array, beta: jax.Array) -> jax.Array:
        m = gram_multiplier(k, squash)
        return _ratio(m * k, _dot(m, jnp.square(k)))

    return write_key


def mean_step(squash: float = 1.0) -> WriteKey:
    """Return m k / a, with a the mean of <m, k^2> over about the last 100 tokens, this one included.

    The step <w, k> is 1 on average, and a token with a small key still has a small step. squash 1 is m = 1.
    """
    keep = 1.0 - 1.0 / MEMORY

    def add(carry: tuple[jax.Array, jax.Array], step: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, count = keep * carry[0] + step, keep * carry[1] + 1.0
        return (total, count), total / count

    def write_key(k: jax.Array, beta: jax.Array) -> jax.Array:
        m = gram_multiplier(k, squash)
        steps = jnp.moveaxis(_dot(m, jnp.square(k)), 1, 0)
        start = (jnp.zeros_like(steps[0]), jnp.zeros_like(steps[0]))
        return _ratio(m * k, jnp.moveaxis(lax.scan(add, start, steps)[1], 0, 1))

    return write_key


def scale_by_feedback(squash: float, *, eta: float) -> WriteKey:
    """Return s m k, with a scalar s learned by the hypergradient from the step <m, k^2>, so that s <m, k^2> -> 1.

    s_{t+1} = max(0, s_t + eta (1 - s_t a_t) a_t) with a = <m, k^2> and s_0 = 1.
    """

    def write_key(k: jax.Array, beta: jax.Array) -> jax.Array:
        m = gram_multiplier(k, squash)
        a = _dot(m, jnp.square(k))
        s = ops.hypergradient_preconditioner(jnp.sqrt(a), eta=eta, initial=1.0, bounds=(0.0, 1e9))[0]
        return s * m * k

    return write_key


def feedback_on_key(squash: float, *, eta: float) -> WriteKey:
    """Return d m k with d from OSDN's feedback on the key alone, so that <d, k^2> -> 1; d_0 = 1."""

    def write_key(k: jax.Array, beta: jax.Array) -> jax.Array:
        d = ops.hypergradient_preconditioner(k, eta=eta, initial=1.0, bounds=(0.0, 1e9))[0]
        return d * gram_multiplier(k, squash) * k

    return write_key


def feedback_on_write_key(squash: float, *, eta: float) -> WriteKey:
    """Return d m k with d from the feedback on what is written, u = m k^2, so that the step <d, m k^2> -> 1; d_0 = 1.

    This is the derivative of (1 - <d, m k^2>)^2 / 2 by d: OSDN on the keys sqrt(m) k.
    """

    def write_key(k: jax.Array, beta: jax.Array) -> jax.Array:
        m = gram_multiplier(k, squash)
        d = ops.hypergradient_preconditioner(jnp.sqrt(m) * k, eta=eta, initial=1.0, bounds=(0.0, 1e9))[0]
        return d * m * k

    return write_key


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    return a / jnp.maximum(b, jnp.finfo(b.dtype).tiny)
