"""Gates of the recurrences: decays of the memory, what is erased and written, forgetting of the preconditioners.

All are float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from osdn_jax.nn import initializers
from osdn_jax.nn.layers import NoDecayParam, linear

_FORGET_BIAS = 6.9  # logistic(6.9) = 0.9990


class DecayGate(nnx.Module):
    """Log decay -exp(A_log) softplus(f(x) + dt_bias), per head or per channel.

    Per head as in arXiv 2405.21060 and 2412.06464, per channel as in 2510.26692, where f is of low rank: width ->
    channels -> heads * channels.
    """

    def __init__(self, width: int, heads: int, channels: int | None, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        """channels: None for a decay per head."""
        self.heads, self.channels = heads, channels
        outputs = heads * (channels or 1)
        self.down = None if channels is None else linear(width, channels, dtype, rngs=rngs)
        self.project = linear(channels or width, outputs, dtype, rngs=rngs)
        self.log_rate = NoDecayParam(initializers.log_decay_rate(rngs.params(), (heads,), jnp.float32))
        self.bias = NoDecayParam(initializers.time_step_bias(rngs.params(), (outputs,), jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"] | Float[Array, "B T H K"]:
        """The log decay of each token, [B, T, H] or [B, T, H, K]."""
        x = x if self.down is None else self.down(x)
        step = jax.nn.softplus(self.project(x).astype(jnp.float32) + self.bias[...][None, None])
        rate = jnp.exp(self.log_rate[...])[None, None]
        if self.channels is None:
            return -rate * step
        return -rate[..., None] * step.reshape(*step.shape[:2], self.heads, self.channels)


class ChannelGate(nnx.Module):
    """A logistic gate per channel: what is erased of each key or written of each value (arXiv 2605.22791).

    Without a bias it starts around 1/2, as beta does.
    """

    def __init__(self, width: int, heads: int, channels: int, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        """heads, channels: of the keys or values that it multiplies."""
        self.heads, self.channels = heads, channels
        self.project = linear(width, heads * channels, dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H C"]:
        """The gate of each token, [B, T, H, C], in (0, 1)."""
        gate = jax.nn.sigmoid(self.project(x).astype(jnp.float32))
        return gate.reshape(*gate.shape[:2], self.heads, self.channels)


class ForgetGate(nnx.Module):
    """Adaptive Preconditioner Forgetting: the log of a logistic gate per token and head (arXiv 2605.13473).

    It starts from weight 0 and bias 6.9, 0.999 for every token, and weight decay leaves it there.
    """

    def __init__(self, width: int, heads: int) -> None:
        """heads: of the preconditioner."""
        self.kernel = NoDecayParam(jnp.zeros((width, heads), jnp.float32))
        self.bias = NoDecayParam(jnp.full((heads,), _FORGET_BIAS, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T P"]:
        """The log of what is kept at each token."""
        return jax.nn.log_sigmoid(x.astype(jnp.float32) @ self.kernel[...] + self.bias[...][None, None])
