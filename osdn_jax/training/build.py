"""Build the model, the optimiser and the step's settings from a configuration."""

import jax
import optax
import optax.contrib
from flax import nnx
from ml_collections import ConfigDict

from osdn_jax.nn import CausalLM, Chunks, MixtureConfig
from osdn_jax.nn.parameters import muon_mask, weight_decay_mask
from osdn_jax.training.model_config import build_model_config
from osdn_jax.training.ranges import check_ranges
from osdn_jax.training.step import StepConfig


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
        config: with the keys of `default_config`; accumulate, batch_size, ema, config.loss and, for a mixture of
            experts, config.model are read.

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
        balance=config.loss.balance if _has_mixture(config) else 0.0,
        ema=config.ema,
    )


def random_state(config: ConfigDict) -> jax.Array:
    """Return the key data (uint32) of the random numbers that training uses after initialisation."""
    return jax.random.key_data(jax.random.fold_in(jax.random.key(config.seed), 1))


def _has_mixture(config: ConfigDict) -> bool:
    if config.model.stack is None:
        return config.model.experts is not None
    return any(isinstance(block.mlp, MixtureConfig) for block, _ in build_model_config(config).counted)
