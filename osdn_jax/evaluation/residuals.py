"""Residuals of the delta rule before and after each write, for the write keys of a mixer and of its shadows.

The inner loss of token t is f_t(S) = |S^T k_t - v_t|^2 / 2. The write of the token, with write key w_t = d_t * k_t,
multiplies the residual e_t = v_t - S~^T k_t of the decayed state S~ by 1 - beta_t <w_t, k_t>. OSDN (arXiv 2605.13473)
reports the square of this factor, the residual ratio q_t = f_t(S_t) / f_t(S~).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from osdn_jax import ops
from osdn_jax.nn.mixer import WriteInputs
from osdn_jax.ops import checks

SMALLEST_LOSS = 1e-20
"""Loss before the write, up to which a token counts with ratio 1, as in the OSDN authors' diagnostic."""

SMALLEST_RATIO = 1e-30
"""Lower limit of the ratio in the geometric mean, as in the OSDN authors' diagnostic."""

SHADOWS = {
    "actual": "actual",
    "one": "d = 1",
    "mean": "mean(d)",
    "matched": "matched step",
}
"""{name: label} of the write keys that `write_keys` returns."""


class Residuals(NamedTuple):
    """Residuals of every token, v_t - S^T k_t; a pytree.

    Attributes:
        before: of the state before the write, after the decay, [B, T, H, V].
        after: of the state after the write, [B, T, H, V].
    """

    before: Float[Array, "B T H V"]
    after: Float[Array, "B T H V"]


def write_keys(k: Float[Array, "B T H K"], multipliers: Float[Array, "B T H K"]) -> dict[str, Float[Array, "B T H K"]]:
    """Return the write keys of a mixer and of its shadows, by the names in `SHADOWS`.

    Args:
        k: the keys that the state is read with, [B, T, H, K].
        multipliers: d, the factor on k that gives the write key, [B, T, H, K].

    Returns:
        "actual": d * k. "one": k, the plain delta rule. "mean": k times the mean of d over the channels of the token,
        as in the OSDN authors' diagnostic. "matched": k <d, u> / <1, u> with u = k^2, a delta rule with the
        mixer's own step <w, k>, token by token, and no preference for any channel.
    """
    u = jnp.square(k)
    energy = jnp.sum(u, axis=-1, keepdims=True)
    step = jnp.sum(multipliers * u, axis=-1, keepdims=True) / jnp.where(energy > 0, energy, 1.0)
    mean = jnp.mean(multipliers, axis=-1, keepdims=True)
    return {"actual": multipliers * k, "one": k, "mean": mean * k, "matched": step * k}


def write_residuals(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    beta: Float[Array, "B T H"],
    write_key: Float[Array, "B T H K"] | None = None,
    *,
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = "scan",
) -> Residuals:
    """Return the residuals of the delta rule before and after every write, both read from the state.

    Args:
        k: the keys that the state is read with, one per value head, [B, T, H, K].
        v: values, [B, T, H, V].
        beta: step size of the write, [B, T, H].
        write_key: [B, T, H, K]; default k.
        log_decay: log of the factor on the state, [B, T, H] or [B, T, H, K]; default no decay.
        segment_ids: [B, T] integers, for packed sequences: the state is reset where the id changes.
        implementation: as for `ops.delta_rule`; the default, "scan", is the specification.

    Raises:
        ValueError, TypeError, NotImplementedError: as `ops.delta_rule`.

    Example:
        >>> import jax.numpy as jnp
        >>> k, v, beta = jnp.ones((1, 2, 1, 1)), jnp.full((1, 2, 1, 1), 4.0), jnp.full((1, 2, 1), 0.5)
        >>> before, after = write_residuals(k, v, beta)
        >>> before.ravel().tolist(), after.ravel().tolist()
        ([4.0, 2.0], [2.0, 1.0])
    """
    arguments = (k, v, beta, write_key, log_decay, segment_ids, implementation)
    before = v - recalled_before(*arguments)
    after = v - _read(k, *arguments)
    return Residuals(before, after)


def recalled_before(
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    write_key: jax.Array | None,
    log_decay: jax.Array | None,
    segment_ids: jax.Array | None,
    implementation: str | None,
) -> jax.Array:
    """Return what the decayed state recalls for each token's key before its write, [B, T, H, V].

    Token t - 1 reads it: (a_t * S_{t-1})^T k_t = S_{t-1}^T (a_t * k_t), so every implementation of the operator, with
    its gradient, computes it.
    """
    query = k
    if log_decay is not None:
        query = k * jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None]).astype(k.dtype)
    if segment_ids is not None:
        continues = jnp.concatenate(
            [jnp.zeros_like(segment_ids[:, :1], bool), segment_ids[:, 1:] == segment_ids[:, :-1]], axis=1
        )
        query = jnp.where(continues[:, :, None, None], query, 0)
    following = jnp.concatenate([query[:, 1:], jnp.zeros_like(query[:, :1])], axis=1)
    recalled = _read(following, k, v, beta, write_key, log_decay, segment_ids, implementation)
    return jnp.concatenate([jnp.zeros_like(recalled[:, :1]), recalled[:, :-1]], axis=1)


def _read(
    query: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    write_key: jax.Array | None,
    log_decay: jax.Array | None,
    segment_ids: jax.Array | None,
    implementation: str | None,
) -> jax.Array:
    return ops.delta_rule(
        query,
        k,
        v,
        beta,
        write_key=write_key,
        log_decay=log_decay,
        scale=1.0,
        segment_ids=segment_ids,
        implementation=implementation,
    )[0]


def per_value_head(inputs: WriteInputs) -> WriteInputs:
    """Return the inputs of a recurrence with queries, keys and multipliers repeated for every value head.

    Floating-point arrays of less than 32 bits become float32.
    """
    heads = inputs.v.shape[2]

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, heads // x.shape[2], axis=2)

    q, k, v, beta, log_decay, multipliers = jax.tree.map(lambda x: x.astype(checks.accumulator_dtype(x)), inputs)
    return WriteInputs(repeated(q), repeated(k), v, beta, log_decay, repeated(multipliers))


def residual_ratio(step: Float[np.ndarray, "..."], loss_before: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return q = (1 - beta <w, k>)^2, or 1 for tokens without a loss to reduce.

    Args:
        step: beta <w, k> of each token.
        loss_before: f_t of the state before the write, of the same shape; q is 1 up to `SMALLEST_LOSS`.

    Example:
        >>> residual_ratio(np.array([0.5, 0.5]), np.array([1.0, 0.0])).tolist()
        [0.25, 1.0]
    """
    return np.where(loss_before <= SMALLEST_LOSS, 1.0, np.square(1.0 - step))


def log_ratio(step: Float[np.ndarray, "..."], loss_before: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return the log of `residual_ratio`, limited below at that of `SMALLEST_RATIO`: what geometric means average."""
    return np.log(np.maximum(residual_ratio(step, loss_before), SMALLEST_RATIO))


def geometric_ratio(
    step: Float[np.ndarray, "B T H"],
    loss_before: Float[np.ndarray, "B T H"],
    valid: Bool[np.ndarray, "B T"],
) -> float:
    """Return the OSDN paper's residual ratio: the geometric mean of q over valid tokens and heads.

    Args:
        step: beta <w, k> of each token.
        loss_before: f_t of the state before the write.
        valid: which tokens count.

    Example:
        >>> step, loss = np.array([[[0.9], [0.0]]]), np.ones((1, 2, 1))
        >>> round(geometric_ratio(step, loss, np.ones((1, 2), bool)), 6)  # of 0.01 and 1
        0.1
    """
    return float(np.exp(np.mean(log_ratio(step, loss_before)[valid])))
