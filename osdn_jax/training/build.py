"""What a configuration stands for: its model, text and optimiser."""

import dataclasses

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from osdn_jax.data import load_tokenizer
from osdn_jax.nn import CausalLM, HypergradientConfig, ModelConfig, mixer_config
from osdn_jax.nn.functional import decays


def build_model_config(config: ConfigDict) -> ModelConfig:
    """The model of a run.

    Raises:
        ValueError: a field out of its range, an unknown rule or preset, or heads that do not divide the width where
            key_dim or value_dim is not given.
        ValueError, FileNotFoundError, ImportError: as `load_tokenizer`, where model.vocab_size is not given.
    """
    model = config.model
    for name in ("key_dim", "value_dim"):
        if model[name] is None and (model.heads < 1 or model.width % model.heads):
            raise ValueError(
                f"model.heads: got {model.heads}, expected a divisor of model.width = {model.width}; "
                f"or give model.{name}, the size of each head"
            )
    mixer = mixer_config(
        model.rule,
        width=model.width,
        heads=model.heads,
        key_heads=model.key_heads,
        key_dim=model.width // model.heads if model.key_dim is None else model.key_dim,
        value_dim=model.width // model.heads if model.value_dim is None else model.value_dim,
        conv_size=model.conv_size,
        negative_eigenvalues=model.negative_eigenvalues,
        chunk_size=model.chunk_size,
        implementation=model.implementation,
    )
    if model.output_gate is not None:
        mixer = dataclasses.replace(mixer, output_gate=model.output_gate)
    if mixer.preconditioner == "hypergradient":
        settings = mixer.hypergradient
        if model.preset is not None:
            settings = HypergradientConfig.preset(model.preset, beta_aware=settings.beta_aware)
        anchor = settings.anchor if model.anchor is None else model.anchor
        settings = dataclasses.replace(settings, forget=model.forget, anchor=anchor)
        mixer = dataclasses.replace(mixer, hypergradient=settings)
    elif model.preset is not None:
        raise ValueError(f"model.preset: got {model.preset!r}, but the rule {model.rule!r} has no such preconditioner")
    return ModelConfig(
        vocab_size=load_tokenizer(config.data.tokenizer).vocab_size if model.vocab_size is None else model.vocab_size,
        layers=model.layers,
        mixer=mixer,
        mlp_dim=model.mlp_dim,
        tied_embeddings=model.tied_embeddings,
        dropout=model.dropout,
        dtype=model.dtype,
    )


def build_model(config: ConfigDict) -> CausalLM:
    """The model of a run, its parameters started from the seed. Raises ValueError as `build_model_config`."""
    return CausalLM(build_model_config(config), rngs=nnx.Rngs(params=config.seed))


def build_schedule(config: ConfigDict) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 to the peak, then a cosine down to its final fraction.

    Raises ValueError where the warm-up leaves no step, or a number is out of range.
    """
    settings = config.optimizer
    if not 0 <= settings.warmup_steps < config.steps:
        raise ValueError(
            f"optimizer.warmup_steps: got {settings.warmup_steps}, expected from 0 to below steps = {config.steps}"
        )
    if not settings.learning_rate > 0:
        raise ValueError(f"optimizer.learning_rate: got {settings.learning_rate}, expected more than 0")
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=config.steps,
        end_value=settings.learning_rate * settings.final_fraction,
    )


def build_optimizer(config: ConfigDict, model: CausalLM) -> optax.GradientTransformation:
    """AdamW with clipping by the global norm; weight decay acts on matrices that no layer has exempted.

    Raises ValueError for a number out of range.
    """
    settings = config.optimizer
    for name in ("beta1", "beta2"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"optimizer.{name}: got {settings[name]}, expected from 0 to below 1")
    if not settings.weight_decay >= 0:
        raise ValueError(f"optimizer.weight_decay: got {settings.weight_decay}, expected at least 0")
    if not settings.clip_norm > 0:
        raise ValueError(f"optimizer.clip_norm: got {settings.clip_norm}, expected more than 0")
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            build_schedule(config),
            b1=settings.beta1,
            b2=settings.beta2,
            weight_decay=settings.weight_decay,
            mask=decays(model),
        ),
    )


def random_state(config: ConfigDict) -> jax.Array:
    """Key data of the run's random numbers after the start, uint32."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1))
