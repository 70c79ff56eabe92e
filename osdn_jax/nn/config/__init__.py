"""Configurations of the modules, and the named rules as fields of a mixer's configuration."""

from osdn_jax.nn.config.attention import AttentionConfig, LatentAttentionConfig
from osdn_jax.nn.config.mixer import MixerConfig
from osdn_jax.nn.config.mlp import MixtureConfig, MLPConfig
from osdn_jax.nn.config.model import MLP, BlockConfig, Mixer, ModelConfig
from osdn_jax.nn.config.preconditioners import GramConfig, HypergradientConfig, SquaresConfig
from osdn_jax.nn.config.rules import RULES, TRANSFORMER, mixer_config

__all__ = [
    "MLP",
    "RULES",
    "TRANSFORMER",
    "AttentionConfig",
    "BlockConfig",
    "GramConfig",
    "HypergradientConfig",
    "LatentAttentionConfig",
    "MLPConfig",
    "Mixer",
    "MixerConfig",
    "MixtureConfig",
    "ModelConfig",
    "SquaresConfig",
    "mixer_config",
]
