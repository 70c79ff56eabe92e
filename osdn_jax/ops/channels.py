"""Sums over channels and their transpose, as products with ones: a CPU runs those several times faster than a sum."""

import jax
import jax.numpy as jnp
from jax import lax


def channel_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis."""
    return jnp.einsum("...k,k->...", x, jnp.ones(x.shape[-1], x.dtype), precision=lax.Precision.HIGHEST)


def over_channels(x: jax.Array, channels: int) -> jax.Array:
    """Repeat along a new last axis. Its gradient is a `channel_sum`, that of broadcasting a plain sum."""
    return jnp.einsum("...,k->...k", x, jnp.ones(channels, x.dtype), precision=lax.Precision.HIGHEST)
