"""Build the configuration of the model of a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from osdn_jax.nn import (
    AttentionConfig,
    BlockConfig,
    HypergradientConfig,
    MixerConfig,
    MixtureConfig,
    MLPConfig,
    ModelConfig,
    mixer_config,
)
from osdn_jax.nn.config import MLP, TRANSFORMER
from osdn_jax.training.ranges import check_ranges
from osdn_jax.training.tasks import vocabulary_size, with_task

_ATTENTION = {  # options of attention, and what leaves them unset
    "positions": "rotary",
    "rotary_dim": None,
    "window": None,
    "qk_norm": False,
    "qk_norm_over": "head",
}
_MOST_BLOCKS = 100_000  # of a model whose blocks are listed
_HYBRID = {"attention_norm": "pre", "attention_heads": None, "attention_key_heads": None, "attention_gate": False}
_MIXTURE = {
    "active_experts": 2,
    "expert_dim": None,
    "shared_expert_dim": 0,
    "shared_expert_gate": False,
    "router": "softmax",
    "dense_layers": 0,
}


def build_model_config(config: ConfigDict) -> ModelConfig:
    """Return the model configuration of a run.

    Args:
        config: with the keys of `default_config`; `config.model` and, for the size of the vocabulary,
            `config.data` are read.

    Returns:
        The configuration that `nn.CausalLM` takes.

    Raises:
        ValueError: a field out of its range, an unknown rule or preset, an option that the rule does not have, heads
            that do not divide the width although key_dim or value_dim is not given, or model.stack is no JSON of a
            ModelConfig.
        ValueError, FileNotFoundError, ImportError: as `load_tokenizer`, if model.vocab_size is not given.

    Example:
        >>> from osdn_jax.training import build_model_config, default_config
        >>> build_model_config(default_config()).vocab_size
        256
    """
    check_ranges(config, "model.")
    config = with_task(config)
    model = config.model
    if model.stack is not None:
        return _described(config)
    for name in ("key_dim", "value_dim"):
        if model[name] is None and model.width % model.heads:
            raise ValueError(
                f"model.heads: got {model.heads}, expected a divisor of model.width = {model.width}; "
                f"or give model.{name}, the size of each head"
            )
    _refuse_unused(config)
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
        mixer = mixer_config(model.rule, **fields, **_attention_fields(config))
    else:
        names = ("conv_size", "negative_eigenvalues", "match_step", "key_norm", "fixed_beta", "decay_rank")
        mixer = mixer_config(model.rule, **fields, **{name: model[name] for name in names})
    if model.output_gate is not None:
        mixer = dataclasses.replace(mixer, output_gate=model.output_gate)
    if isinstance(mixer, MixerConfig):
        gate = ("output_gate_rank", "output_gate_bias", "output_gate_activation")
        mixer = dataclasses.replace(mixer, **{name: model[name] for name in gate})
    mixer = _with_preconditioner(config, mixer)
    shared: dict[str, Any] = {
        "vocab_size": vocabulary_size(config),
        "tied_embeddings": model.tied_embeddings,
        "dropout": model.dropout,
        "dtype": model.dtype,
        "remat": model.remat,
    }
    if model.attention_every is None and model.experts is None:
        return ModelConfig(layers=model.layers, mixer=mixer, mlp_dim=model.mlp_dim, **shared)
    return ModelConfig(blocks=_blocks(config, mixer), **shared)


def model_name(config: ConfigDict) -> str:
    """Return a name of a run's model for messages and figures: its rule, or the folder that it started from."""
    if config.get("init"):
        return Path(config.init).name
    model = config.model
    if model.get("stack") is not None:
        return "stack"
    return model.rule if model.get("attention_every") is None else f"{model.rule} hybrid"


def _blocks(config: ConfigDict, mixer: MixerConfig | AttentionConfig) -> tuple[BlockConfig, ...]:
    """Return the blocks of a hybrid, or of a model with a mixture of experts."""
    model = config.model
    if model.layers > _MOST_BLOCKS:
        raise ValueError(f"model.layers: got {model.layers}, expected at most {_MOST_BLOCKS:,} in a hybrid or mixture")
    every = model.layers + 1 if model.attention_every is None else model.attention_every
    attention = _attention(config) if model.attention_every is not None else mixer
    blocks = []
    for number in range(model.layers):
        is_attention = (number + 1) % every == 0
        blocks.append(
            BlockConfig(
                attention if is_attention else mixer,
                _mlp(config, number),
                model.attention_norm if is_attention else "pre",
            )
        )
    return tuple(blocks)


def _attention(config: ConfigDict) -> AttentionConfig:
    """Return the attention of a hybrid, whose heads have width / heads channels."""
    model = config.model
    heads = model.attention_heads or model.heads
    if model.width % heads:
        name = "heads" if model.attention_heads is None else "attention_heads"
        raise ValueError(f"model.{name}: got {heads}, expected a divisor of model.width = {model.width}")
    size = model.width // heads
    fields = _attention_fields(config) | {"key_heads": model.attention_key_heads, "output_gate": model.attention_gate}
    return AttentionConfig(width=model.width, heads=heads, key_dim=size, value_dim=size, **fields)


def _attention_fields(config: ConfigDict) -> dict[str, Any]:
    model = config.model
    if model.positions not in ("rotary", "none"):
        raise ValueError(f"model.positions: got {model.positions!r}, expected one of rotary, none")
    fields = {name: model[name] for name in _ATTENTION if name != "positions"}
    fields["rotary_base"] = None if model.positions == "none" else model.rotary_base
    fields["max_length"] = config.sequence_length if model.max_length is None else model.max_length
    return fields


def _mlp(config: ConfigDict, number: int) -> MLP:
    model = config.model
    if model.experts is None or number < model.dense_layers:
        return MLPConfig(model.mlp_dim)
    return MixtureConfig(
        experts=model.experts,
        active=model.active_experts,
        hidden=model.mlp_dim if model.expert_dim is None else model.expert_dim,
        router=model.router,
        shared_hidden=model.shared_expert_dim,
        shared_gate=model.shared_expert_gate,
    )


def _described(config: ConfigDict) -> ModelConfig:
    """Return the model that model.stack describes, with the run's dropout, dtype and rematerialisation."""
    model = config.model
    try:
        made = ModelConfig.from_dict(json.loads(model.stack))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"model.stack: expected JSON of the fields of an nn.ModelConfig: {error}") from error
    size = vocabulary_size(config)
    if size > made.vocab_size:
        raise ValueError(
            f"data.tokenizer: got a vocabulary of {size}, expected at most the {made.vocab_size} entries of the model"
        )
    return dataclasses.replace(made, dropout=model.dropout, dtype=model.dtype, remat=model.remat)


def _refuse_unused(config: ConfigDict) -> None:
    """Raise ValueError, naming the key, for an option of something that the model does not have."""
    model = config.model
    if model.rule == TRANSFORMER:
        gates = {"output_gate_rank": None, "output_gate_bias": False, "output_gate_activation": "silu"}
        delta = {"negative_eigenvalues": False, "match_step": False, "key_norm": True, "fixed_beta": None}
        _refuse(config, "has no delta rule", **delta, **gates, decay_rank=None, attention_every=None)
    elif model.attention_every is None:
        _refuse(config, "has no attention, and model.attention_every is not set", **_ATTENTION)
    if model.attention_every is None:
        _refuse(config, "is no hybrid: model.attention_every is not set", **_HYBRID)
    if model.experts is None:
        _refuse(config, "has no mixture of experts: model.experts is not set", **_MIXTURE)


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
