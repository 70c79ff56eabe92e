"""The best fixed preconditioner in hindsight, the comparator of a preconditioner's regret."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from osdn_jax.evaluation.residuals import recalled_before

STEPS = 100
"""Default number of gradient steps of `best_fixed_multipliers`."""

_LEARNING_RATE = 0.1  # of Adam on log d, decayed to 0 by a cosine: d can change by a factor of 100 in 100 steps
_DIVERGED = 10.0  # times the loss of a state that is never written
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's usual ones


class Hindsight(NamedTuple):
    """The best fixed preconditioner that was found; a pytree.

    Attributes:
        multipliers: d, [H, K].
        loss: mean over valid tokens of f_t before the write with this d, by head, [H].
        start: the same with the d that the search started from.
    """

    multipliers: Float[Array, "H K"]
    loss: Float[Array, " H"]
    start: Float[Array, " H"]


def best_fixed_multipliers(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    *,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
    start: Float[Array, "H K"] | None = None,
    per_channel: bool = True,
    steps: int = STEPS,
    implementation: str | None = None,
) -> Hindsight:
    """Search, for each head, the d whose write keys d * k give the smallest loss over all tokens of all sequences.

    The loss is the true one, the mean over tokens of f_t(S~_t) = |S~_t^T k_t - v_t|^2 / 2 before the write of token t,
    where S~_t holds all earlier writes with this d: that of an online learner, not that after its own write. It is not
    convex in d, so this is an upper bound of the best loss. Adam on log d, with a learning rate that falls from 0.1
    to 0 by a cosine; the gradient goes through the whole recurrence. Each head's best iterate is returned, so the loss
    is never above that of the start. Where the recurrence diverges at the start (a loss above ten times that of a
    state that is never written), d is halved at each step until it does not.

    Args:
        k: the keys that the state is read with, one per value head, [B, T, H, K].
        v: values, [B, T, H, V].
        beta: step size of the write, [B, T, H].
        log_decay: log of the factor on the state, [B, T, H] or [B, T, H, K]; default no decay.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        valid: [B, T], which tokens' losses count; default all.
        start: d to start from, [H, K], positive. Default: ones.
        per_channel: False searches one number per head, c, for d = c: the best damping; start is then the same for all
            channels of a head. Default: True.
        steps: number of gradient steps. Default: 100.
        implementation: as for `ops.delta_rule`.

    Returns:
        d, its loss, and the loss at the start of the search.

    Raises:
        ValueError: steps is no int of at least 0.
        ValueError, TypeError, NotImplementedError: as `ops.delta_rule`.

    Example:
        Keys of one channel, values that do not change: the best d writes all of the residual, beta d k^2 = 1.

        >>> import jax.numpy as jnp
        >>> k, v, beta = jnp.ones((1, 8, 1, 1)), jnp.ones((1, 8, 1, 1)), jnp.full((1, 8, 1), 0.5)
        >>> found = best_fixed_multipliers(k, v, beta)
        >>> round(float(found.multipliers[0, 0]), 2)
        2.0
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: got {steps!r}, expected an int of at least 0")
    weights = jnp.ones(k.shape[:2], k.dtype) if valid is None else valid.astype(k.dtype)
    log_d = jnp.zeros(k.shape[2:], k.dtype) if start is None else jnp.log(start).astype(k.dtype)
    arrays = (k, v, beta, log_decay, segment_ids, weights)
    return _search(arrays, log_d, jnp.asarray(per_channel), steps=steps, implementation=implementation)


# Whether there is a d per channel or per head is not static, so that one program serves both.
@functools.partial(jax.jit, static_argnames=("steps", "implementation"))
def _search(
    arrays: tuple[Any, ...], log_d: jax.Array, per_channel: jax.Array, *, steps: int, implementation: str | None
) -> Hindsight:
    k, v, beta, log_decay, segment_ids, weights = arrays
    count = jnp.maximum(jnp.sum(weights), 1)

    def mean_loss(residual: jax.Array) -> jax.Array:
        squares = jnp.sum(jnp.square(residual), axis=-1)
        return 0.5 * jnp.sum(weights[:, :, None] * squares, axis=(0, 1)) / count

    def losses(log_d: jax.Array) -> jax.Array:
        write_key = jnp.exp(log_d)[None, None] * k
        return mean_loss(v - recalled_before(k, v, beta, write_key, log_decay, segment_ids, implementation))

    limit = _DIVERGED * mean_loss(v)

    def step(carry: tuple[Any, ...], rates: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        log_d, first, second, best, best_loss = carry
        # The heads do not depend on each other: the gradient of the sum is that of each head's loss.
        loss, pull = jax.vjp(losses, log_d)
        (gradient,) = pull(jnp.ones_like(loss))
        gradient = jnp.where(per_channel, gradient, jnp.mean(gradient, axis=1, keepdims=True))
        best = jnp.where((loss < best_loss)[:, None], log_d, best)
        best_loss = jnp.fmin(loss, best_loss)
        # A head whose recurrence diverges returns to its best iterate; d is halved until there is one.
        sound = ((loss <= limit) & jnp.all(jnp.isfinite(gradient), axis=1))[:, None]
        gradient = jnp.where(sound, gradient, 0)
        first = _BETA1 * first + (1 - _BETA1) * gradient
        second = _BETA2 * second + (1 - _BETA2) * jnp.square(gradient)
        update = rates[0] * first / (jnp.sqrt(rates[1] * second) + _EPSILON)
        fallback = jnp.where((best_loss <= limit)[:, None], best, log_d - math.log(2))
        return (jnp.where(sound, log_d - update, fallback), first, second, best, best_loss), loss

    zeros = jnp.zeros_like(log_d)
    start: tuple[Any, ...] = (log_d, zeros, zeros, log_d, jnp.full(log_d.shape[:1], jnp.inf, log_d.dtype))
    (*_, best, best_loss), every = lax.scan(step, start, jnp.asarray(_rates(steps), log_d.dtype))
    return Hindsight(jnp.exp(best), best_loss, every[0])


def _rates(steps: int) -> np.ndarray:
    """Return Adam's learning rate over its first bias correction, and the inverse of the second, [steps + 1, 2].

    The learning rate after the last step is 0: what is computed there is the loss of the last iterate.
    """
    t = np.arange(1, steps + 2)
    rate = _LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * (t - 1) / max(steps, 1)))
    return np.stack([rate / (1 - _BETA1**t), 1 / (1 - _BETA2**t)], axis=1)
