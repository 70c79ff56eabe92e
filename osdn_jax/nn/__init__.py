"""Flax NNX modules: mixers (the delta-rule family, softmax attention), MLP, blocks and a causal language model.

`mixer_config` gives the configuration of a named rule's mixer, and `DeltaMixer` is that mixer as a module for your own
model. `ModelConfig` and `CausalLM` are a whole language model; `split_model` turns it into a pure function of its
parameters, and `likelihood_sums` gives its loss. `BlockState` is the state that one of its blocks carries from call to
call: a `MixerState` or an `AttentionState`.
"""

from osdn_jax.nn.attention import AttentionState, SoftmaxAttention
from osdn_jax.nn.chunked_loss import Chunks, cross_entropy
from osdn_jax.nn.config import (
    RULES,
    AttentionConfig,
    GramConfig,
    HypergradientConfig,
    MixerConfig,
    ModelConfig,
    mixer_config,
)
from osdn_jax.nn.gates import ChannelGate, DecayGate, ForgetGate
from osdn_jax.nn.layers import NoDecayParam, ShortConvolution, SwiGLU, unit_norm
from osdn_jax.nn.likelihood import LikelihoodSums, likelihood_sums
from osdn_jax.nn.mixer import DeltaMixer, MixerState, WriteInputs
from osdn_jax.nn.model import Block, BlockState, CausalLM
from osdn_jax.nn.parallel import TensorParallel
from osdn_jax.nn.parameters import (
    count_parameters,
    mixer_formula,
    muon_mask,
    parameter_formula,
    weight_decay_mask,
)
from osdn_jax.nn.sharding import MESH_AXES, parameter_spec
from osdn_jax.nn.split import Parameters, split_model

__all__ = [
    "MESH_AXES",
    "RULES",
    "AttentionConfig",
    "AttentionState",
    "Block",
    "BlockState",
    "CausalLM",
    "ChannelGate",
    "Chunks",
    "DecayGate",
    "DeltaMixer",
    "ForgetGate",
    "GramConfig",
    "HypergradientConfig",
    "LikelihoodSums",
    "MixerConfig",
    "MixerState",
    "ModelConfig",
    "NoDecayParam",
    "Parameters",
    "ShortConvolution",
    "SoftmaxAttention",
    "SwiGLU",
    "TensorParallel",
    "WriteInputs",
    "count_parameters",
    "cross_entropy",
    "likelihood_sums",
    "mixer_config",
    "mixer_formula",
    "muon_mask",
    "parameter_formula",
    "parameter_spec",
    "split_model",
    "unit_norm",
    "weight_decay_mask",
]
