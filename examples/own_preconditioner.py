"""A preconditioner of your own, as the write key of `ops.delta_rule`:  python examples/own_preconditioner.py

The delta rule takes one gradient step per token on |S^T k - v|^2. Where some channels of the keys are much larger than
others, it learns the small ones slowly. Dividing each channel of the step by a running mean of its squares, as RMSProp
does with gradients, evens that out. A preconditioner is a pure function from keys to write keys; the operator, its
chunkwise form, its gradient and its kernels stay as they are.
"""

import jax
import jax.numpy as jnp

from osdn_jax import nn, ops

B, T, H, K, V = 8, 512, 1, 16, 16


def mean_square_write_key(k: jax.Array, initial: jax.Array, decay: float = 0.98) -> tuple[jax.Array, jax.Array]:
    """Return write keys [B, T, H, K], of length <w, k> = 1, and the running mean after the last token [B, H, K]."""

    def step(mean: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = decay * mean + (1 - decay) * jnp.square(key)
        return mean, key / (mean + 1e-4)

    final, w = jax.lax.scan(step, initial, jnp.moveaxis(k, 1, 0))
    w = jnp.moveaxis(w, 0, 1)
    return w / jnp.sum(w * k, axis=-1, keepdims=True), final  # beta <w, k> <= 2, or a single write overshoots


key, weight = jax.random.split(jax.random.key(0))
scales = jnp.logspace(0, -1.5, K)  # the last channel is thirty times smaller than the first
k = nn.unit_norm(scales * jax.random.normal(key, (B, T, H, K)))
v = k @ jax.random.normal(weight, (K, V))  # what the state has to learn
beta = jnp.full((B, T, H), 0.8)
w, _ = mean_square_write_key(k, jnp.full((B, H, K), 1 / K))


def error(write_key: jax.Array) -> jax.Array:
    """Return the squared error of predicting each value of the last quarter before it is written."""
    # Reading with the key of the next token: o_t = S_t^T k_{t+1}.
    o, _ = ops.delta_rule(jnp.roll(k, -1, axis=1), k, v, beta, write_key=write_key, scale=1.0)
    return jnp.mean(jnp.square(o[:, -T // 4 : -1] - v[:, -T // 4 + 1 :]))


print(f"mean squared error: delta rule {error(k):.2e}, preconditioned {error(w):.2e}")
