"""Build the model, the optimiser and the step's settings from a configuration."""

import dataclasses
from typing import Any

import jax
import optax
import optax.contrib
from flax import nnx
from ml_collections import ConfigDict

from osdn_jax.nn import AttentionConfig, CausalLM, Chunks, HypergradientConfig, MixerConfig, ModelConfig, mixer_config
from osdn_jax.nn.config import TRANSFORMER
from osdn_jax.nn.parameters import muon_mask, weight_decay_mask
from osdn_jax.training.ranges import check_ranges
from osdn_jax.training.step import StepConfig
from osdn_jax.training.tasks import vocabulary_size, with_task


def build_model_config(config: ConfigDict) -> ModelConfig:
    """Return the model configuration of a run.

    Args:
        config: with the keys of `default_config`; `config.model` and, for the size of the vocabulary,
            `config.data` are read.

    Returns:
        The configuration that `nn.CausalLM` takes.

    Raises:
        ValueError: a field out of its range, an unknown rule or preset, an option that the rule does not have, or
            heads that do not divide the width although key_dim or value_dim is not given.
        ValueError, FileNotFoundError, ImportError: as `load_tokenizer`, if model.vocab_size is not given.

    Example:
        >>> from osdn_jax.training import build_model_config, default_config
        >>> build_model_config(default_config()).vocab_size
        256
    """
    check_ranges(config, "model.")
    config = with_task(config)
    model = config.model
    for name in ("key_dim", "value_dim"):
        if model[name] is None and model.width % model.heads:
            raise ValueError(
                f"model.heads: got {model.heads}, expected a divisor of model.width = {model.width}; "
                f"or give model.{name}, the size of each head"
            )
    fields = {
        "width": model.width,
        "heads": model.heads,
        "key_heads": model.key_heads,
        "key_dim": model.width // model.heads if model.key_dim is None else model.key_dim,
        "value_dim": model.width // model.heads if model.value_dim is None else model.value_dim,
        "chunk_size": model.chunk_size,
        "implementation": model.implementation,
    }
    if model.rule == TRANSFORMER:
        _refuse(
            config, "has no delta rule", negative_eigenvalues=False, match_step=False, key_norm=True, fixed_beta=None
        )
        longest = config.sequence_length if model.max_length is None else model.max_length
        fields |= {"rotary_base": model.rotary_base, "qk_norm": model.qk_norm, "max_length": longest}
    else:
        names = ("conv_size", "negative_eigenvalues", "match_step", "key_norm", "fixed_beta")
        fields |= {name: model[name] for name in names}
    mixer = mixer_config(model.rule, **fields)
    if model.output_gate is not None:
        mixer = dataclasses.replace(mixer, output_gate=model.output_gate)
    mixer = _with_preconditioner(config, mixer)
    return ModelConfig(
        vocab_size=vocabulary_size(config),
        layers=model.layers,
        mixer=mixer,
        mlp_dim=model.mlp_dim,
        tied_embeddings=model.tied_embeddings,
        dropout=model.dropout,
        dtype=model.dtype,
        remat=model.remat,
    )


def _with_preconditioner(config: ConfigDict, mixer: MixerConfig | AttentionConfig) -> MixerConfig | AttentionConfig:
    """Return the mixer with the settings of its preconditioner; raise ValueError for those of one it does not have."""
    model = config.model
    kind = mixer.preconditioner if isinstance(mixer, MixerConfig) else "none"
    if kind != "hypergradient":
        others = dict.fromkeys(("preset", "beta_aware", "eta", "initial", "anchor"))
        _refuse(config, "has no hypergradient preconditioner", **others, forget_gate="token")
    if kind != "gram":
        _refuse(config, "has no Gram preconditioner", squash=None)
    if not isinstance(mixer, MixerConfig):
        return mixer
    if kind == "gram" and model.squash is not None:
        return dataclasses.replace(mixer, gram=dataclasses.replace(mixer.gram, squash=model.squash))
    if kind != "hypergradient":
        return mixer
    settings = mixer.hypergradient
    if model.preset is not None:
        settings = HypergradientConfig.preset(model.preset, beta_aware=settings.beta_aware)
    changes = {name: model[name] for name in ("beta_aware", "eta", "initial", "anchor") if model[name] is not None}
    changes |= {name: model[name] for name in ("forget", "forget_gate", "forget_constant")}
    return dataclasses.replace(mixer, hypergradient=dataclasses.replace(settings, **changes))


def _refuse(config: ConfigDict, why: str, **unset: Any) -> None:
    """Raise ValueError if one of these options of the model has another value than the one that leaves it unset."""
    for name, value in unset.items():
        if config.model[name] != value:
            raise ValueError(f"model.{name}: got {config.model[name]!r}, but the rule {config.model.rule!r} {why}")


def build_model(config: ConfigDict) -> CausalLM:
    """Return the model of a run, its parameters initialised from config.seed.

    Args:
        config: with the keys of `default_config`.

    Raises:
        ValueError: as `build_model_config`.

    Example:
        >>> from osdn_jax import nn
        >>> from osdn_jax.training import build_model, default_config
        >>> f"{nn.count_parameters(build_model(default_config())):,}"
        '833,416'
    """
    return CausalLM(build_model_config(config), rngs=nnx.Rngs(params=config.seed))


def build_schedule(config: ConfigDict, peak: str = "learning_rate") -> optax.Schedule:
    """Return the learning rate by step: linear warm-up from 0 to the peak, then a cosine down to its final fraction.

    Args:
        config: with the keys of `default_config`; config.steps and config.optimizer are read.
        peak: the key of config.optimizer that has the peak.

    Raises:
        ValueError: a number is out of range, or the warm-up is not shorter than config.steps.

    Example:
        >>> from osdn_jax.training import build_schedule, default_config
        >>> schedule = build_schedule(default_config())
        >>> [round(float(schedule(step)), 6) for step in (0, 50, 100, 1000)]
        [0.0, 0.0015, 0.003, 0.0003]
    """
    check_ranges(config, "steps", "optimizer.")
    settings = config.optimizer
    if not settings.warmup_steps < config.steps:
        raise ValueError(
            f"optimizer.warmup_steps: got {settings.warmup_steps}, expected from 0 to below steps = {config.steps}"
        )
    return _schedule(settings[peak], config)


def _schedule(peak: float, config: ConfigDict) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=config.optimizer.warmup_steps,
        decay_steps=config.steps,
        end_value=peak * config.optimizer.final_fraction,
    )


def build_optimizer(
    config: ConfigDict, model: CausalLM, *, learning_rate: jax.Array | None = None
) -> optax.GradientTransformation:
    """Return the optimiser of a run: AdamW, or Muon and AdamW, with clipping by the global norm.

    Weight decay applies to matrices, except for those that a layer exempts (`nn.NoDecayParam`). Muon optimises the
    weight matrices of the blocks as the model stores them (q, k and v are one matrix, and so are gate and up of an MLP)
    and AdamW the rest: embeddings, head, gates, norms, convolutions (https://kellerjordan.github.io/posts/muon).

    Args:
        config: with the keys of `default_config`; config.steps and config.optimizer are read.
        model: of `build_model`; shapes in place of arrays are enough.
        learning_rate: the peak of AdamW's schedule as an array, so that one program takes any; default:
            optimizer.learning_rate.

    Raises:
        ValueError: an unknown optimiser or a number out of range.
    """
    check_ranges(config, "optimizer.")
    settings = config.optimizer
    if settings.name not in ("adamw", "muon"):
        raise ValueError(f"optimizer.name: got {settings.name!r}, expected one of adamw, muon")
    schedule = build_schedule(config)
    if learning_rate is not None:
        share = _schedule(1.0, config)
        schedule = lambda step: learning_rate * share(step)
    optimizer = optax.adamw(
        schedule,
        b1=settings.beta1,
        b2=settings.beta2,
        weight_decay=settings.weight_decay,
        mask=weight_decay_mask(model),
    )
    if settings.name == "muon":
        muon = optax.contrib.muon(
            build_schedule(config, "muon_learning_rate"),
            beta=settings.muon_momentum,
            weight_decay=settings.weight_decay,
        )
        labels = {name: "muon" if chosen else "adamw" for name, chosen in muon_mask(model).items()}
        optimizer = optax.partition({"muon": muon, "adamw": optimizer}, labels)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def build_step_config(config: ConfigDict) -> StepConfig:
    """Return the settings of the training step that are not the optimiser's.

    Args:
        config: with the keys of `default_config`; accumulate, batch_size, ema and config.loss are read.

    Raises:
        ValueError: a number out of range, or accumulate does not divide batch_size.
    """
    check_ranges(config, "batch_size", "accumulate", "loss.", "ema")
    if config.batch_size % config.accumulate:
        raise ValueError(f"accumulate: got {config.accumulate}, expected a divisor of batch_size = {config.batch_size}")
    return StepConfig(
        accumulate=config.accumulate,
        chunks=Chunks(config.loss.sequence_chunk, config.loss.vocabulary_chunk),
        z_loss=config.loss.z_loss,
        ema=config.ema,
    )


def random_state(config: ConfigDict) -> jax.Array:
    """Return the key data (uint32) of the random numbers that training uses after initialisation."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1))
