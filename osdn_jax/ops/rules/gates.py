"""Checks that the gates of a rule are given, with the number of axes that the rule requires."""

import jax

from osdn_jax.ops import checks


def beta_per_head(beta: jax.Array) -> jax.Array:
    """Return beta as a [B, T, H] array, or raise TypeError or ValueError."""
    return checks.floating_array("beta", beta, 3, "[B, T, H]")


def scalar_decay(log_decay: jax.Array) -> jax.Array:
    """Return log_decay as a [B, T, H] array, or raise TypeError or ValueError."""
    return checks.floating_array("log_decay", log_decay, 3, "[B, T, H]")


def channel_decay(log_decay: jax.Array) -> jax.Array:
    """Return log_decay as a [B, T, H, K] array, or raise TypeError or ValueError."""
    return checks.floating_array("log_decay", log_decay, 4, "[B, T, H, K]")
