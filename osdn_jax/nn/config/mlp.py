"""The configurations of the blocks' MLPs."""

import dataclasses
from typing import Literal

from osdn_jax.nn.config import fields
from osdn_jax.ops import checks


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """A gated MLP, down(activation(gate(x)) * up(x)); `nn.SwiGLU` describes it.

    Args:
        hidden: number of hidden units.
        activation: "silu" (the default), or "powlu": x^(3 / (sqrt(x) + 1)) sigmoid(x) for x > 0, else silu(x).

    Raises:
        ValueError: a field is out of range.
    """

    hidden: int
    activation: Literal["silu", "powlu"] = "silu"

    def __post_init__(self) -> None:
        """Check the fields."""
        fields.at_least_one("hidden", self.hidden)
        fields.one_of("activation", self.activation, ("silu", "powlu"))


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """A mixture of experts, each a SwiGLU; `nn.MixtureOfExperts` describes it.

    Args:
        experts: E, number of experts.
        active: experts that each token is sent to.
        hidden: hidden units of an expert.
        router: "softmax" (the default): the weights are probabilities over all experts (Qwen). "sigmoid": each expert
            is scored by itself, and a bias that changes no weight takes part in the choice (DeepSeek-V3, Kimi).
        renormalize: scale the weights of a token's experts to a sum of 1. Default: True.
        groups: groups of neighbouring experts; a token's experts are in its best `active_groups` groups, ranked by the
            sum of their two best scores. Needs the sigmoid router. Default: 1.
        active_groups: see `groups`. Default: 1.
        scale: factor on the weights. Default: 1.
        shared_hidden: hidden units of an expert that every token is sent to; 0 for none. Default: 0.
        shared_gate: multiply the shared expert's output by a logistic gate of the input. Default: False.

    Raises:
        ValueError: a field is out of range, or fields do not go together.
        TypeError: a field has another type.
    """

    experts: int
    active: int
    hidden: int
    router: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    groups: int = 1
    active_groups: int = 1
    scale: float = 1.0
    shared_hidden: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("experts", "active", "hidden", "groups", "active_groups"):
            fields.at_least_one(name, getattr(self, name))
        fields.one_of("router", self.router, ("softmax", "sigmoid"))
        for name in ("renormalize", "shared_gate"):
            checks.flag(name, getattr(self, name))
        fields.positive("scale", self.scale)
        shared = self.shared_hidden
        if not isinstance(shared, int) or isinstance(shared, bool) or shared < 0:
            raise ValueError(f"shared_hidden: got {shared!r}, expected an int of at least 0")
        if self.shared_gate and not shared:
            raise ValueError("shared_gate: got True with shared_hidden=0, expected a shared expert")
        if self.experts % self.groups:
            raise ValueError(f"groups: got {self.groups}, expected a divisor of the {self.experts} experts")
        if self.active_groups > self.groups:
            raise ValueError(f"active_groups: got {self.active_groups}, expected at most groups = {self.groups}")
        if self.groups > 1 and self.router != "sigmoid":
            raise ValueError(f"groups: got {self.groups} with router={self.router!r}, expected 1")
        available = self.experts // self.groups * self.active_groups
        if self.active > available:
            raise ValueError(f"active: got {self.active}, expected at most the {available} experts to choose from")
