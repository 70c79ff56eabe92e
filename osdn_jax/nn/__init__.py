"""Flax NNX modules: mixers (the delta-rule family, softmax attention), MLPs, blocks and a causal language model.

`mixer_config` gives the configuration of a named rule's mixer, and `DeltaMixer` is that mixer as a module for your own
model. `ModelConfig` and `CausalLM` are a whole language model; `split_model` turns it into a pure function of its
parameters, and `likelihood_sums` gives its loss. `BlockState` is the state that one of its blocks carries from call to
call: a `MixerState`, an `AttentionState` or a `LatentState`. A hybrid lists its blocks in `ModelConfig`: each has one
of these mixers, and a gated MLP or a `MixtureOfExperts`.
"""

from osdn_jax.nn.attention import AttentionState, SoftmaxAttention
from osdn_jax.nn.chunked_loss import Chunks, cross_entropy
from osdn_jax.nn.config import (
    RULES,
    AttentionConfig,
    BlockConfig,
    GramConfig,
    HypergradientConfig,
    LatentAttentionConfig,
    MixerConfig,
    MixtureConfig,
    MLPConfig,
    ModelConfig,
    SquaresConfig,
    mixer_config,
)
from osdn_jax.nn.gates import ChannelGate, DecayGate, ForgetGate, OutputGate
from osdn_jax.nn.latent_attention import LatentAttention, LatentState
from osdn_jax.nn.layers import NoDecayParam, ShortConvolution, SwiGLU, unit_norm
from osdn_jax.nn.likelihood import LikelihoodSums, likelihood_sums
from osdn_jax.nn.mixer import DeltaMixer, MixerState, WriteInputs
from osdn_jax.nn.mixture import MixtureOfExperts, Routing
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
    "BlockConfig",
    "BlockState",
    "CausalLM",
    "ChannelGate",
    "Chunks",
    "DecayGate",
    "DeltaMixer",
    "ForgetGate",
    "GramConfig",
    "HypergradientConfig",
    "LatentAttention",
    "LatentAttentionConfig",
    "LatentState",
    "LikelihoodSums",
    "MLPConfig",
    "MixerConfig",
    "MixerState",
    "MixtureConfig",
    "MixtureOfExperts",
    "ModelConfig",
    "NoDecayParam",
    "OutputGate",
    "Parameters",
    "Routing",
    "ShortConvolution",
    "SoftmaxAttention",
    "SquaresConfig",
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
