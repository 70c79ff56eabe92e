"""Configurations of the modules, and the papers' rules by name."""

import dataclasses
from typing import Any, Literal

from osdn_jax.ops import checks, hypergradient_preset
from osdn_jax.ops.delta_rule import IMPLEMENTATIONS

Decay = Literal["none", "scalar", "channel"]
Strength = Literal["scalar", "channel"]
Preconditioner = Literal["none", "hypergradient", "gram"]
# What a block keeps for its gradient: all, only what its weights were multiplied to, only its input.
Remat = Literal["none", "blocks", "full"]

TRANSFORMER = "transformer"  # the one rule that is no delta rule


def _positive(name: str, value: float) -> None:
    if checks.number(name, value) <= 0:
        raise ValueError(f"{name}: got {value}, expected more than 0")


@dataclasses.dataclass(frozen=True)
class HypergradientConfig:
    """Settings of the hypergradient preconditioner (arXiv 2605.13473); see `ops.hypergradient_preconditioner`.

    Raises ValueError or TypeError where a field is out of its range.
    """

    eta: float = 1.0
    bounds: tuple[float, float] | None = (0.0, 1e9)
    initial: float = 0.0  # what the learned d_0 starts from
    anchor: float = 0.0
    forget: bool = True  # Adaptive Preconditioner Forgetting: a gate per token and head, near 0.999 at first
    beta_aware: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        """Checks the fields; bounds may come as a list, as JSON has them."""
        for name in ("eta", "initial", "anchor"):
            checks.number(name, getattr(self, name))
        for name in ("forget", "beta_aware", "normalize"):
            checks.flag(name, getattr(self, name))
        object.__setattr__(self, "bounds", checks.bounds(self.bounds))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "HypergradientConfig":
        """The published setting "paper" or "trust", with changes. Raises ValueError for another name.

        "trust" forgets toward 1: toward 0, as the paper's, forgetting would soon hold d on its lower bound of 2/3.
        """
        anchor = {"trust": 1.0}.get(name, 0.0)
        return cls(**{"anchor": anchor, **hypergradient_preset(name), **changes})


@dataclasses.dataclass(frozen=True)
class GramConfig:
    """Settings of the Gram preconditioner (arXiv 2604.21100); see `ops.gram_preconditioner`.

    Raises ValueError or TypeError where a field is out of its range.
    """

    center: float = -0.2  # what the learned center starts from
    squash: float = 1.5

    def __post_init__(self) -> None:
        """Checks the fields."""
        checks.number("center", self.center)
        _positive("squash", self.squash)


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """A token mixer of the delta-rule family: what decays, what gates and preconditions the write, and its sizes.

    Raises ValueError where a field is out of its range.
    """

    width: int
    heads: int
    key_dim: int  # per head
    value_dim: int  # per head
    key_heads: int | None = None  # default: as many as heads
    decay: Decay = "none"
    erase: bool = True  # False: linear attention
    strength: Strength = "scalar"  # "channel": in place of beta an erase gate on the key and a write gate on the value
    preconditioner: Preconditioner = "none"
    hypergradient: HypergradientConfig = HypergradientConfig()
    gram: GramConfig = GramConfig()
    conv_size: int = 4
    negative_eigenvalues: bool = False  # beta, or the erase gate, in (0, 2) instead of (0, 1)
    output_gate: bool = False
    norm_epsilon: float = 1e-6
    chunk_size: int | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("width", "heads", "key_dim", "value_dim", "conv_size"):
            _at_least_one(name, getattr(self, name))
        _divides_heads(self.key_heads, self.heads)
        _one_of("decay", self.decay, ("none", "scalar", "channel"))
        _one_of("strength", self.strength, ("scalar", "channel"))
        _one_of("preconditioner", self.preconditioner, ("none", "hypergradient", "gram"))
        for name in ("erase", "negative_eigenvalues", "output_gate"):
            checks.flag(name, getattr(self, name))
        _positive("norm_epsilon", self.norm_epsilon)
        _nested(self, "hypergradient", HypergradientConfig)
        _nested(self, "gram", GramConfig)
        checks.chunk_size(self.chunk_size)
        checks.implementation(self.implementation, IMPLEMENTATIONS)
        if not self.erase and self.preconditioner != "none":
            raise ValueError(f"preconditioner: got {self.preconditioner!r} with erase=False, expected 'none'")
        if self.strength == "channel" and (self.erase, self.decay, self.preconditioner) != (True, "channel", "none"):
            raise ValueError(
                f"strength: got 'channel' with erase={self.erase}, decay={self.decay!r} and "
                f"preconditioner={self.preconditioner!r}, expected it with erase=True, decay='channel' and "
                "preconditioner='none'"
            )

    @property
    def num_key_heads(self) -> int:
        """Hk, the key heads."""
        return self.key_heads or self.heads

    @property
    def preconditioner_heads(self) -> int:
        """P: one preconditioner per value head where it follows that head's beta, else one per key head."""
        aware = self.preconditioner == "hypergradient" and self.hypergradient.beta_aware
        return self.heads if aware else self.num_key_heads


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal softmax attention with rotary positions; see `nn.SoftmaxAttention`.

    Raises ValueError where a field is out of its range.
    """

    width: int
    heads: int
    key_dim: int  # per head, even
    value_dim: int  # per head
    key_heads: int | None = None  # of keys and values; default: as many as heads
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    output_gate: bool = False
    norm_epsilon: float = 1e-6
    max_length: int = 2048  # tokens that a state holds
    chunk_size: int | None = None  # queries at a time
    implementation: Literal["chunk", "cudnn"] | None = None  # None: chunk

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("width", "heads", "key_dim", "value_dim", "max_length"):
            _at_least_one(name, getattr(self, name))
        _divides_heads(self.key_heads, self.heads)
        for name in ("qk_norm", "output_gate"):
            checks.flag(name, getattr(self, name))
        _positive("norm_epsilon", self.norm_epsilon)
        if self.key_dim % 2:
            raise ValueError(f"key_dim: got {self.key_dim}, expected an even number, for rotary positions turn pairs")
        if not checks.number("rotary_base", self.rotary_base) > 1:
            raise ValueError(f"rotary_base: got {self.rotary_base}, expected more than 1")
        checks.chunk_size(self.chunk_size)
        checks.implementation(self.implementation, ("chunk", "cudnn"))
        if self.implementation == "cudnn" and self.key_dim != self.value_dim:
            raise ValueError(
                f"implementation: got 'cudnn' with key_dim={self.key_dim} and value_dim={self.value_dim}, "
                "expected it with equal ones"
            )

    @property
    def num_key_heads(self) -> int:
        """Hk, the heads of keys and values."""
        return self.key_heads or self.heads


RULES: dict[str, dict[str, Any]] = {
    "delta_net": {},
    "gated_delta_net": {"decay": "scalar", "output_gate": True},
    "kda": {"decay": "channel", "output_gate": True},
    "gdn2": {"decay": "channel", "strength": "channel", "output_gate": True},
    "osdn": {"preconditioner": "hypergradient"},
    "os_gdn": {
        "decay": "scalar",
        "output_gate": True,
        "preconditioner": "hypergradient",
        "hypergradient": HypergradientConfig.preset("trust", beta_aware=True),
    },
    "os_kda": {
        "decay": "channel",
        "output_gate": True,
        "preconditioner": "hypergradient",
        "hypergradient": HypergradientConfig.preset("trust", beta_aware=True),
    },
    "pdn": {"preconditioner": "gram"},
    "pgdn": {"decay": "scalar", "output_gate": True, "preconditioner": "gram"},
    "pkda": {"decay": "channel", "output_gate": True, "preconditioner": "gram"},
    "linear_attention": {"erase": False},
    "mamba2": {"decay": "scalar", "erase": False, "output_gate": True},
    "gla": {"decay": "channel", "erase": False, "output_gate": True},
    TRANSFORMER: {},
}


def mixer_config(rule: str, **fields: Any) -> MixerConfig | AttentionConfig:
    """The mixer of a rule by its paper's name, with further fields; "transformer" is softmax attention.

    Raises ValueError for an unknown rule.
    """
    _one_of("rule", rule, tuple(RULES))
    kind = AttentionConfig if rule == TRANSFORMER else MixerConfig
    return kind(**{**RULES[rule], **fields})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A causal language model: embedding, blocks of mixer and MLP, norm, head.

    Raises ValueError where a field is out of its range.
    """

    vocab_size: int
    layers: int
    mixer: MixerConfig | AttentionConfig
    mlp_dim: int
    tied_embeddings: bool = False
    norm_epsilon: float = 1e-6
    dropout: float = 0.0  # on what each mixer and MLP adds to the residual stream
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products; parameters are float32
    remat: Remat = "none"  # what each block computes again for its gradient; see Remat

    def __post_init__(self) -> None:
        """Checks the fields."""
        for name in ("vocab_size", "layers", "mlp_dim"):
            _at_least_one(name, getattr(self, name))
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("remat", self.remat, ("none", "blocks", "full"))
        checks.flag("tied_embeddings", self.tied_embeddings)
        _positive("norm_epsilon", self.norm_epsilon)
        _nested(self, "mixer", MixerConfig, AttentionConfig)
        if not 0.0 <= checks.number("dropout", self.dropout) < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected a rate from 0 to below 1")


def _at_least_one(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an int of at least 1")


def _nested(config: Any, name: str, *kinds: type[Any]) -> None:
    """Makes the field a config of one of the kinds where it is a dict of its fields, as `dataclasses.asdict` writes it.

    Raises TypeError for anything else, and for a dict that fits none of the kinds or several.
    """
    value, names = getattr(config, name), " or ".join(kind.__name__ for kind in kinds)
    if isinstance(value, kinds):
        return
    if not isinstance(value, dict):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a {names}")
    fitting = [kind for kind in kinds if set(value) <= {field.name for field in dataclasses.fields(kind)}]
    if len(fitting) != 1:
        raise TypeError(f"{name}: got a dict with the keys {', '.join(map(str, value))}, expected those of a {names}")
    object.__setattr__(config, name, fitting[0](**value))


def _divides_heads(key_heads: int | None, heads: int) -> None:
    if key_heads is not None:
        _at_least_one("key_heads", key_heads)
        if heads % key_heads:
            raise ValueError(f"key_heads: got {key_heads}, expected a divisor of the {heads} heads")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
