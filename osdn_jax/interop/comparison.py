"""One configuration for all that compute the same from the same parameters, to compare models by."""

import dataclasses
from typing import Any

from osdn_jax.nn.config import AttentionConfig, GramConfig, HypergradientConfig, Mixer, MixerConfig, SquaresConfig


def normal_mixer(mixer: Mixer) -> Mixer:
    """Return the mixer's configuration with one value for each field that changes no logits of a given model.

    Those are how it is computed, the initial values of parameters, and settings of what the mixer does not have.
    """
    fields: dict[str, Any] = {"chunk_size": None}
    if isinstance(mixer, MixerConfig | AttentionConfig):
        fields |= {"implementation": None, "key_heads": mixer.num_key_heads}
    if isinstance(mixer, AttentionConfig):
        fields["rotary_dim"] = None if mixer.rotary_base is None else mixer.rotary_dim or mixer.key_dim
    if not isinstance(mixer, MixerConfig):
        return dataclasses.replace(mixer, **fields)
    if mixer.heads == mixer.num_key_heads:
        fields |= {"beta_per_key_head": False, "preconditioner_per_value_head": False}
    if mixer.decay == "channel":
        fields["decay_rank"] = mixer.decay_rank or mixer.key_dim
    kind = mixer.preconditioner
    fields["hypergradient"] = _hypergradient(mixer.hypergradient) if kind == "hypergradient" else HypergradientConfig()
    fields["gram"] = _gram(mixer.gram) if kind == "gram" else GramConfig()
    fields["squares"] = dataclasses.replace(mixer.squares, initial=0.0) if kind == "squares" else SquaresConfig()
    return dataclasses.replace(mixer, **fields)


def _hypergradient(settings: HypergradientConfig) -> HypergradientConfig:
    fields: dict[str, Any] = {"initial": 0.0}
    if settings.learned_eta:
        fields["eta"] = 0.0
    if not settings.forget:
        fields |= {"anchor": 0.0, "forget_gate": "token"}
    if not settings.forget or settings.forget_gate != "constant":
        fields["forget_constant"] = 1.0
    return dataclasses.replace(settings, **fields)


def _gram(settings: GramConfig) -> GramConfig:
    return dataclasses.replace(settings, center=0.0, squash=1.0 if settings.learned_squash else settings.squash)
