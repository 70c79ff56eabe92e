"""Parameter initialisers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Normal with standard deviation fan_in^-1/2.
kernel = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
embedding = nnx.initializers.normal(stddev=0.02)


def residual_kernel(layers: int) -> nnx.Initializer:
    """Return the initialiser of a projection back into the residual stream, of a model of that many layers.

    It is scaled so that the sum of all 2 * layers of them has the variance of one `kernel` projection.
    """
    return nnx.initializers.variance_scaling(1.0 / (2 * layers), "fan_in", "normal")


def log_decay_rate(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Sample A_log of Mamba-2 and Gated DeltaNet: the log of a rate uniform in (1, 16)."""
    return jnp.log(jax.random.uniform(key, shape, dtype, minval=1.0, maxval=16.0))


def time_step_bias(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Sample dt_bias: its softplus is log-uniform in (0.001, 0.1)."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, minval=np.log(0.001), maxval=np.log(0.1)))
    return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus
