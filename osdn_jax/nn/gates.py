"""Gates of the recurrences: decay of the state, erase and write gates, forgetting of the preconditioners, output gate.

All of them but the output gate return float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from osdn_jax.nn import initializers
from osdn_jax.nn.layers import NoDecayParam, linear, project

_FORGET_BIAS = 6.9  # logistic(6.9) = 0.9990


class DecayGate(nnx.Module):
    """Log decay of each token, -exp(A_log) softplus(f(x) + dt_bias), per head or per channel.

    Per head as in Mamba-2 and Gated DeltaNet (arXiv 2405.21060, 2412.06464), where f is a projection. Per channel as in
    KDA (2510.26692), where f has low rank: width -> channels -> heads * channels.

    Args:
        width: D, size of the residual stream.
        heads: H, number of heads.
        channels: K, key channels of a head, for a decay per channel; None for a decay per head.
        dtype: of the projections.
        rank: channels between the two projections of a decay per channel. Default: K.
        bound: b < 0 for the log decay b sigmoid(exp(A_log) (f(x) + dt_bias)) of a decay per channel, which is never
            below b (github.com/fla-org/flash-linear-attention). Default: None, the decay above.
        scaled: multiply the log decay by |s|, a learned number per head that starts at 1. Default: False.
        rngs: random streams for the parameters.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        channels: int | None,
        dtype: DTypeLike,
        rank: int | None = None,
        bound: float | None = None,
        scaled: bool = False,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the parameters."""
        self.heads, self.channels, self.bound = heads, channels, bound
        outputs, inner = heads * (channels or 1), rank or channels
        self.down = None if inner is None else linear(width, inner, dtype, rngs=rngs)
        self.project = linear(inner or width, outputs, dtype, rngs=rngs)
        self.log_rate = NoDecayParam(initializers.log_decay_rate(rngs.params(), (heads,), jnp.float32))
        self.bias = NoDecayParam(initializers.time_step_bias(rngs.params(), (outputs,), jnp.float32))
        self.scale = NoDecayParam(jnp.ones((heads,), jnp.float32)) if scaled else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"] | Float[Array, "B T H K"]:
        """Return the log decay of each token, [B, T, H] or [B, T, H, K], at most 0."""
        x = x if self.down is None else self.down(x)
        step = self.project(x).astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None]
        rate = jnp.exp(self.log_rate[...].astype(jnp.float32))[None, None]
        if self.channels is not None:
            rate, step = rate[..., None], step.reshape(*step.shape[:2], self.heads, self.channels)
        if self.bound is None:
            log_decay = -rate * jax.nn.softplus(step)
        else:
            log_decay = self.bound * jax.nn.sigmoid(rate * step)
        if self.scale is None:
            return log_decay
        # The gradient of |s| is 1 or -1 except at 0, so a gate that starts near 0 can learn a decay.
        return log_decay * jnp.abs(self.scale[...].astype(jnp.float32)).reshape(1, 1, -1, *(1,) * (log_decay.ndim - 3))


class ChannelGate(nnx.Module):
    """Logistic gate per channel: the erase gate on keys and the write gate on values of GDN-2 (arXiv 2605.22791).

    It has no bias, so it starts around 1/2, as beta does.

    Args:
        width: D, size of the residual stream.
        heads: number of heads of the keys or values that it multiplies.
        channels: C, channels of one head.
        dtype: of the projection.
        rngs: random streams for the parameters.
    """

    def __init__(self, width: int, heads: int, channels: int, dtype: DTypeLike, *, rngs: nnx.Rngs) -> None:
        """Create the parameters."""
        self.heads, self.channels = heads, channels
        self.project = linear(width, heads * channels, dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H C"]:
        """Return the gate of each token, in (0, 1)."""
        gate = jax.nn.sigmoid(self.project(x).astype(jnp.float32))
        return gate.reshape(*gate.shape[:2], self.heads, self.channels)


class ForgetGate(nnx.Module):
    """Adaptive Preconditioner Forgetting: the log of a logistic gate per token and head (arXiv 2605.13473).

    Weight 0 and bias 6.9 give 0.999 for every token at the start of training, and weight decay acts on neither.

    Args:
        width: D, size of the residual stream.
        heads: P, number of preconditioners.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Create the parameters."""
        self.kernel = NoDecayParam(jnp.zeros((width, heads), jnp.float32))
        self.bias = NoDecayParam(jnp.full((heads,), _FORGET_BIAS, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T P"]:
        """Return the log of the fraction of the preconditioner that each token keeps."""
        kernel, bias = (parameter[...].astype(jnp.float32) for parameter in (self.kernel, self.bias))
        return jax.nn.log_sigmoid(project(x.astype(jnp.float32), kernel) + bias[None, None])


class HeadForgetGate(nnx.Module):
    """The log of one learned logistic gate per head, 0.999 at the start; weight decay does not act on it.

    Forgetting of the ablation of arXiv 2605.13473; `ForgetGate` has a gate per token too.

    Args:
        heads: P, number of preconditioners.
    """

    def __init__(self, heads: int) -> None:
        """Create the parameters."""
        self.bias = NoDecayParam(jnp.full((heads,), _FORGET_BIAS, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T P"]:
        """Return the log of the fraction of the preconditioner that each token keeps."""
        bias = self.bias[...].astype(jnp.float32)
        return jnp.broadcast_to(jax.nn.log_sigmoid(bias)[None, None], (*x.shape[:2], *bias.shape))


class OutputGate(nnx.Module):
    """Projection to the output gate of a mixer, of low rank or with a bias (KDA, arXiv 2510.26692).

    Args:
        width: D, size of the residual stream.
        outputs: number of channels that the gate multiplies.
        rank: channels between the two projections; None for one projection.
        bias: add a bias to the last projection.
        dtype: of the projections.
        rngs: random streams for the parameters.
    """

    def __init__(
        self, width: int, outputs: int, rank: int | None, bias: bool, dtype: DTypeLike, *, rngs: nnx.Rngs
    ) -> None:
        """Create the parameters."""
        self.down = None if rank is None else linear(width, rank, dtype, rngs=rngs)
        self.project = linear(rank or width, outputs, dtype, bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        """Return the gate before its activation."""
        return self.project(x if self.down is None else self.down(x))
