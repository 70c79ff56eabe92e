"""Models to generate with, every kind of mixer and hybrids, and their continuations without any state."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from osdn_jax import nn
from osdn_jax.nn.config import (
    AttentionConfig,
    BlockConfig,
    LatentAttentionConfig,
    MixtureConfig,
    MLPConfig,
    ModelConfig,
    mixer_config,
)
from support import jit
from support.models import SHAPES, VOCABULARY, model_config

LONGEST = 64  # tokens of a text, at most
_SIZES = {"width": 12, "heads": 2, "key_dim": 6, "value_dim": 5}
_MLP, _EXPERTS = MLPConfig(10), MixtureConfig(4, 2, 6)

MODELS = {
    "delta_attention": (
        BlockConfig(mixer_config("os_gdn", **SHAPES), _MLP),
        BlockConfig(AttentionConfig(**SHAPES, qk_norm=True, output_gate=True, rotary_dim=4), _MLP),
    ),
    "latent_experts": (
        BlockConfig(mixer_config("kda", **_SIZES), _EXPERTS),
        BlockConfig(LatentAttentionConfig(**_SIZES, rank=8, shared_key_dim=4), _EXPERTS),
    ),
    "window": (
        BlockConfig(mixer_config("delta_net", **SHAPES), _MLP),
        BlockConfig(AttentionConfig(**_SIZES, window=7, rotary_base=None), _MLP, norm="post"),
    ),
}
# One model for several rules: most of the time of these tests is compilation, and a model has few programs.
STACKS = {
    "additive": ("linear_attention", "mamba2", "gla"),
    "erasing": ("delta_net", "gated_delta_net", "kda", "gdn2"),
    "osdn": ("osdn", "os_gdn", "os_kda"),
    "gram": ("pdn", "pgdn", "pkda"),
    "attention": ("transformer",),
}
MODELS |= {
    name: tuple(BlockConfig(mixer_config(rule, **SHAPES), _MLP) for rule in rules) for name, rules in STACKS.items()
}


@functools.cache
def language_model(name):
    """Return a `CausalLM`, with noise added to the parameters, some of which start constant."""
    if name in nn.RULES:
        config = model_config(name)
    else:
        config = ModelConfig(vocab_size=VOCABULARY, blocks=MODELS[name])
    model = nn.CausalLM(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = nnx.state(model)
    for _, x in nnx.to_flat_state(state):
        x.set_value(x.get_value() + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype))
    nnx.update(model, state)
    return model


@functools.cache
def _forward(name):
    apply, parameters = nn.split_model(language_model(name))
    program = jit(lambda parameters, tokens: apply(parameters, tokens)[0])
    return lambda tokens: program(parameters, tokens)


def logits_after(name, texts):
    """Return the logits [B, vocabulary] after each text, from one call for the whole texts; zeros follow them."""
    padded = np.zeros((len(texts), LONGEST), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    logits = np.asarray(_forward(name)(jnp.asarray(padded)))
    return np.stack([row[len(text) - 1] for row, text in zip(logits, texts, strict=True)])


def prompts(*lengths, seed=5):
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCABULARY, size=length).tolist() for length in lengths]
