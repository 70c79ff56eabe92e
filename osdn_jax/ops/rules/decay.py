"""Checks that a rule's log decay is per head or per channel, as the rule requires."""

import jax

from osdn_jax.ops import checks


def scalar_decay(log_decay: jax.Array) -> jax.Array:
    """Return log_decay as a [B, T, H] array, or raise TypeError or ValueError."""
    return checks.floating_array("log_decay", log_decay, 3, "[B, T, H]")


def channel_decay(log_decay: jax.Array) -> jax.Array:
    """Return log_decay as a [B, T, H, K] array, or raise TypeError or ValueError."""
    return checks.floating_array("log_decay", log_decay, 4, "[B, T, H, K]")
