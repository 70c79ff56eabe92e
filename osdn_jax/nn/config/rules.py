"""The named rules as fields of a mixer's configuration."""

from typing import Any

from osdn_jax.nn.config.attention import AttentionConfig
from osdn_jax.nn.config.fields import one_of
from osdn_jax.nn.config.mixer import MixerConfig
from osdn_jax.nn.config.preconditioners import HypergradientConfig

TRANSFORMER = "transformer"  # the one rule that is not a delta rule: softmax attention

RULES: dict[str, dict[str, Any]] = {
    "delta_net": {},
    "gated_delta_net": {"decay": "scalar", "output_gate": True},
    "kda": {"decay": "channel", "output_gate": True},
    "gdn2": {"decay": "channel", "strength": "channel", "output_gate": True},
    "osdn": {"preconditioner": "hypergradient"},
    "os_gdn": {
        "decay": "scalar",
        "output_gate": True,
        "preconditioner": "hypergradient",
        "hypergradient": HypergradientConfig.preset("trust", beta_aware=True),
    },
    "os_kda": {
        "decay": "channel",
        "output_gate": True,
        "preconditioner": "hypergradient",
        "hypergradient": HypergradientConfig.preset("trust", beta_aware=True),
    },
    "pdn": {"preconditioner": "gram"},
    "pgdn": {"decay": "scalar", "output_gate": True, "preconditioner": "gram"},
    "pkda": {"decay": "channel", "output_gate": True, "preconditioner": "gram"},
    "linear_attention": {"erase": False},
    "mamba2": {"decay": "scalar", "erase": False, "output_gate": True},
    "gla": {"decay": "channel", "erase": False, "output_gate": True},
    TRANSFORMER: {},
}
"""{rule: the fields of its `MixerConfig`}, for `mixer_config`; "transformer" has those of an `AttentionConfig`."""


def mixer_config(rule: str, **fields: Any) -> MixerConfig | AttentionConfig:
    """Return the configuration of a named rule's mixer.

    Args:
        rule: a key of `nn.RULES`, such as "osdn" or "gated_delta_net"; "transformer" is softmax attention.
        **fields: sizes and options of `MixerConfig` ("transformer": `AttentionConfig`); they override the rule's.

    Raises:
        ValueError: an unknown rule, or a field out of range.
        TypeError: an unknown or missing field.

    Example:
        >>> mixer = mixer_config("os_gdn", width=64, heads=4, key_dim=16, value_dim=16, key_heads=2)
        >>> mixer.decay, mixer.preconditioner, mixer.hypergradient.eta
        ('scalar', 'hypergradient', 0.003)
    """
    one_of("rule", rule, tuple(RULES))
    config = AttentionConfig if rule == TRANSFORMER else MixerConfig
    return config(**{**RULES[rule], **fields})
