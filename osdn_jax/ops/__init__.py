"""Pure functions on arrays: the delta rule, its preconditioners, the named rules, and one-token steps.

Every array is laid out [B, T, H, D]: batch, tokens, heads, channels. Everything works under jit, grad, vmap, shard_map
and remat.
"""

from osdn_jax.ops.delta_rule_operator import delta_rule
from osdn_jax.ops.exact_gram import exact_gram_write_key
from osdn_jax.ops.gram import gram_preconditioner, gram_write_key
from osdn_jax.ops.hypergradient import (
    hypergradient_preconditioner,
    hypergradient_preset,
    hypergradient_write_key,
)
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
from osdn_jax.ops.scan import delta_rule_step
from osdn_jax.ops.squares import squares_preconditioner, squares_write_key

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
    "gram_write_key",
    "hypergradient_preconditioner",
    "hypergradient_preset",
    "hypergradient_write_key",
    "kda",
    "linear_attention",
    "mamba2",
    "os_gdn",
    "os_kda",
    "osdn",
    "pdn",
    "pgdn",
    "pkda",
    "squares_preconditioner",
    "squares_write_key",
]
