"""The named rules: calls of `delta_rule` with the gates, and the write keys of the preconditioner, of each.

All take q, k, v by position and everything else by keyword, and return (o, State).
"""

from osdn_jax.ops.rules.additive import gla, linear_attention, mamba2
from osdn_jax.ops.rules.erasing import delta_net, gated_delta_net, gdn2, kda
from osdn_jax.ops.rules.gram_preconditioned import exact_pdn, pdn, pgdn, pkda
from osdn_jax.ops.rules.online_scaled import os_gdn, os_kda, osdn
from osdn_jax.ops.rules.state import State

__all__ = [
    "State",
    "delta_net",
    "exact_pdn",
    "gated_delta_net",
    "gdn2",
    "gla",
    "kda",
    "linear_attention",
    "mamba2",
    "os_gdn",
    "os_kda",
    "osdn",
    "pdn",
    "pgdn",
    "pkda",
]
