"""Flax NNX modules: mixers (the delta-rule family, softmax attention), MLP, blocks and a causal language model."""

from osdn_jax.nn.attention import AttentionState, SoftmaxAttention
from osdn_jax.nn.config import (
    RULES,
    AttentionConfig,
    GramConfig,
    HypergradientConfig,
    MixerConfig,
    ModelConfig,
    mixer_config,
)
from osdn_jax.nn.cross_entropy import Chunks, cross_entropy
from osdn_jax.nn.gates import ChannelGate, DecayGate, ForgetGate
from osdn_jax.nn.layers import Exempt, ShortConvolution, SwiGLU, unit_norm
from osdn_jax.nn.mixer import DeltaMixer, MixerState
from osdn_jax.nn.model import Block, CausalLM
from osdn_jax.nn.parameters import count_parameters, mixer_formula, parameter_formula
from osdn_jax.nn.sharding import MESH_AXES, parameter_spec

__all__ = [
    "MESH_AXES",
    "RULES",
    "AttentionConfig",
    "AttentionState",
    "Block",
    "CausalLM",
    "ChannelGate",
    "Chunks",
    "DecayGate",
    "DeltaMixer",
    "Exempt",
    "ForgetGate",
    "GramConfig",
    "HypergradientConfig",
    "MixerConfig",
    "MixerState",
    "ModelConfig",
    "ShortConvolution",
    "SoftmaxAttention",
    "SwiGLU",
    "count_parameters",
    "cross_entropy",
    "mixer_config",
    "mixer_formula",
    "parameter_formula",
    "parameter_spec",
    "unit_norm",
]
