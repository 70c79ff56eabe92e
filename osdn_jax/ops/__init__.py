"""Pure functions on arrays: the delta rule, its preconditioners, the named rules, and one-token steps."""

from osdn_jax.ops.delta_rule import delta_rule
from osdn_jax.ops.gram import exact_gram_write_key, gram_preconditioner
from osdn_jax.ops.hypergradient import hypergradient_preconditioner, hypergradient_preset
from osdn_jax.ops.recurrence import delta_rule_step
from osdn_jax.ops.rules import (
    State,
    delta_net,
    exact_pdn,
    gated_delta_net,
    gdn2,
    gla,
    kda,
    linear_attention,
    mamba2,
    os_gdn,
    os_kda,
    osdn,
    pdn,
    pgdn,
    pkda,
)

__all__ = [
    "State",
    "delta_net",
    "delta_rule",
    "delta_rule_step",
    "exact_gram_write_key",
    "exact_pdn",
    "gated_delta_net",
    "gdn2",
    "gla",
    "gram_preconditioner",
    "hypergradient_preconditioner",
    "hypergradient_preset",
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
