"""Configurations of the modules, and the named rules as fields of a mixer's configuration."""

import dataclasses
from typing import Any, Literal

from osdn_jax.ops import checks, hypergradient_preset
from osdn_jax.ops.delta_rule_operator import IMPLEMENTATIONS

Decay = Literal["none", "scalar", "channel"]
Strength = Literal["scalar", "channel"]
Preconditioner = Literal["none", "hypergradient", "gram"]
ForgetGate = Literal["token", "head", "constant"]
# Rematerialisation, what a block keeps for its gradient: everything, the outputs of its matrix products with weights
# ("blocks"), or its input only ("full").
Remat = Literal["none", "blocks", "full"]

TRANSFORMER = "transformer"  # the one rule that is not a delta rule: softmax attention


def _positive(name: str, value: float) -> None:
    if checks.number(name, value) <= 0:
        raise ValueError(f"{name}: got {value}, expected more than 0")


def _at_least_one(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected an int of at least 1")


def _nested(config: Any, name: str, *kinds: type[Any]) -> None:
    """Replace a field that is a dict, as `dataclasses.asdict` writes it, by the config whose fields it has.

    Raises TypeError for any other type, and for a dict whose keys do not identify one config.
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


@dataclasses.dataclass(frozen=True)
class HypergradientConfig:
    """Settings of the hypergradient preconditioner of OSDN (arXiv 2605.13473).

    `ops.hypergradient_preconditioner` has the equations.

    Args:
        eta: step size of the preconditioner's update. Default: 1.
        bounds: (low, high) that each entry of d is clipped to, or None for no bounds. Default: (0, 1e9).
        initial: value that the learned initial preconditioner d_0 is initialised to. Default: 0.
        anchor: value that forgetting moves d toward. Default: 0.
        forget: forget d by a gate. Default: True.
        forget_gate: "token" (the default), a gate per token and head that starts near 0.999: Adaptive Preconditioner
            Forgetting; "head", a learned gate per head that starts there; "constant", `forget_constant` for all. The
            last two are of the paper's ablation.
        forget_constant: share of d - anchor that the gate "constant" keeps per token. Default: 0.999.
        beta_aware: b_t = beta in the update instead of 1, with one preconditioner per value head. Default: False.
        normalize: divide the update by sum(k^2) + 1e-5. Default: False.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    eta: float = 1.0
    bounds: tuple[float, float] | None = (0.0, 1e9)
    initial: float = 0.0
    anchor: float = 0.0
    forget: bool = True
    beta_aware: bool = False
    normalize: bool = False
    forget_gate: ForgetGate = "token"
    forget_constant: float = 0.999

    def __post_init__(self) -> None:
        """Check the fields; bounds may be a list, as in JSON."""
        for name in ("eta", "initial", "anchor"):
            checks.number(name, getattr(self, name))
        for name in ("forget", "beta_aware", "normalize"):
            checks.flag(name, getattr(self, name))
        _one_of("forget_gate", self.forget_gate, ("token", "head", "constant"))
        if not 0.0 < checks.number("forget_constant", self.forget_constant) <= 1.0:
            raise ValueError(f"forget_constant: got {self.forget_constant}, expected above 0 and at most 1")
        object.__setattr__(self, "bounds", checks.bounds(self.bounds))

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "HypergradientConfig":
        """Return a published setting, "paper" or "trust", with changes.

        "trust" forgets toward 1: toward 0, as in the paper, forgetting would soon hold d on its lower bound of 2/3.

        Args:
            name: "paper" or "trust".
            **changes: fields that replace those of the setting.

        Raises:
            ValueError: another name, or a field out of range.

        Example:
            >>> HypergradientConfig.preset("trust", forget=False).bounds
            (0.6666666666666666, 1.5)
        """
        anchor = {"trust": 1.0}.get(name, 0.0)
        return cls(**{"anchor": anchor, **hypergradient_preset(name), **changes})


@dataclasses.dataclass(frozen=True)
class GramConfig:
    """Settings of the Gram preconditioner of Preconditioned DeltaNet (arXiv 2604.21100).

    `ops.gram_preconditioner` has the equations.

    Args:
        center: value that the learned center, one per preconditioner, is initialised to. Default: -0.2.
        squash: x, at least 1 in the paper, so that the factors on the keys lie in [1/x, x]; 1 for no preconditioning.
            Default: 1.5.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    center: float = -0.2
    squash: float = 1.5

    def __post_init__(self) -> None:
        """Check the fields."""
        checks.number("center", self.center)
        _positive("squash", self.squash)


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """A token mixer of the delta-rule family: its decay, gates, preconditioner and sizes.

    `mixer_config` gives the configurations of the named rules.

    Args:
        width: D, size of the residual stream.
        heads: H, number of value heads.
        key_dim: K, key channels per head.
        value_dim: V, value channels per head.
        key_heads: Hk, number of query and key heads, a divisor of `heads`. Default: `heads`.
        decay: decay of the state: "none" (the default), "scalar" per head, or "channel" for each key channel.
        erase: subtract what the state recalls for the key before writing (the delta rule); False for linear attention.
            Default: True.
        strength: "scalar" (the default) for beta, one number per head and token; "channel" for an erase gate on each
            key channel and a write gate on each value channel in its place (GDN-2).
        preconditioner: how the write key is computed from the key: "none" (the default), "hypergradient" or "gram".
        hypergradient: settings of the hypergradient preconditioner.
        gram: settings of the Gram preconditioner.
        match_step: write under k times one number per token, <w, k> / <k, k> for the preconditioner's write key w: the
            step of each write is the preconditioner's and its direction is not. A control for experiments: what a
            preconditioner gains over it comes from its direction. Default: False.
        conv_size: taps of the short convolution. Default: 4.
        key_norm: normalise keys to unit length; queries always are. Default: True.
        negative_eigenvalues: beta, or the erase gate, in (0, 2) instead of (0, 1). Default: False.
        fixed_beta: beta of every token, more than 0, in place of the learned gate. Default: None, the gate.
        output_gate: multiply the output by a gate of the input. Default: False.
        norm_epsilon: of the RMS norm of the output. Default: 1e-6.
        chunk_size: tokens in a chunk, as in `ops.delta_rule`. Default: chosen by the implementation.
        implementation: as in `ops.delta_rule`. Default: the fastest for device, shapes and dtype.

    Raises:
        ValueError: a field is out of range, or fields do not go together.
        TypeError: a field has another type.
    """

    width: int
    heads: int
    key_dim: int
    value_dim: int
    key_heads: int | None = None
    decay: Decay = "none"
    erase: bool = True
    strength: Strength = "scalar"
    preconditioner: Preconditioner = "none"
    hypergradient: HypergradientConfig = HypergradientConfig()
    gram: GramConfig = GramConfig()
    conv_size: int = 4
    negative_eigenvalues: bool = False
    output_gate: bool = False
    norm_epsilon: float = 1e-6
    chunk_size: int | None = None
    implementation: str | None = None
    match_step: bool = False
    key_norm: bool = True
    fixed_beta: float | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("width", "heads", "key_dim", "value_dim", "conv_size"):
            _at_least_one(name, getattr(self, name))
        _divides_heads(self.key_heads, self.heads)
        _one_of("decay", self.decay, ("none", "scalar", "channel"))
        _one_of("strength", self.strength, ("scalar", "channel"))
        _one_of("preconditioner", self.preconditioner, ("none", "hypergradient", "gram"))
        for name in ("erase", "negative_eigenvalues", "output_gate", "match_step", "key_norm"):
            checks.flag(name, getattr(self, name))
        _positive("norm_epsilon", self.norm_epsilon)
        _nested(self, "hypergradient", HypergradientConfig)
        _nested(self, "gram", GramConfig)
        checks.chunk_size(self.chunk_size)
        checks.implementation(self.implementation, IMPLEMENTATIONS)
        if not self.erase and self.preconditioner != "none":
            raise ValueError(f"preconditioner: got {self.preconditioner!r} with erase=False, expected 'none'")
        if self.match_step and self.preconditioner == "none":
            raise ValueError("match_step: got True with preconditioner='none', expected a preconditioner to match")
        self._check_fixed_beta()
        if self.strength == "channel" and (self.erase, self.decay, self.preconditioner) != (True, "channel", "none"):
            raise ValueError(
                f"strength: got 'channel' with erase={self.erase}, decay={self.decay!r} and "
                f"preconditioner={self.preconditioner!r}, expected it with erase=True, decay='channel' and "
                "preconditioner='none'"
            )

    def _check_fixed_beta(self) -> None:
        if self.fixed_beta is None:
            return
        _positive("fixed_beta", self.fixed_beta)
        if self.negative_eigenvalues or not self.gated_write:
            raise ValueError(
                f"fixed_beta: got {self.fixed_beta} with negative_eigenvalues={self.negative_eigenvalues}, "
                f"strength={self.strength!r}, erase={self.erase} and decay={self.decay!r}, expected None or a rule "
                "whose beta is a gate in (0, 1)"
            )

    @property
    def gated_write(self) -> bool:
        """True if the rule has one beta per token and value head."""
        return self.strength == "scalar" and (self.erase or self.decay == "scalar")

    @property
    def num_key_heads(self) -> int:
        """Hk, the number of query and key heads."""
        return self.key_heads or self.heads

    @property
    def preconditioner_heads(self) -> int:
        """P, the number of preconditioners: one per value head if it depends on that head's beta, else per key head."""
        aware = self.preconditioner == "hypergradient" and self.hypergradient.beta_aware
        return self.heads if aware else self.num_key_heads


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal softmax attention with rotary positions; `nn.SoftmaxAttention` describes it.

    Args:
        width: D, size of the residual stream.
        heads: H, number of query heads.
        key_dim: K, channels of queries and keys per head, an even number.
        value_dim: V, value channels per head.
        key_heads: Hk, number of key and value heads, a divisor of `heads`. Default: `heads`.
        rotary_base: base of the rotary frequencies. Default: 10,000.
        qk_norm: normalise queries and keys per head. Default: False.
        output_gate: multiply the output by a gate of the input. Default: False.
        norm_epsilon: of the norms of queries and keys. Default: 1e-6.
        max_length: tokens that a state holds. Default: 2048.
        chunk_size: queries at a time. Default: 512.
        implementation: "chunk" (the default, None) or "cudnn".

    Raises:
        ValueError: a field is out of range, or fields do not go together.
        TypeError: a field has another type.
    """

    width: int
    heads: int
    key_dim: int
    value_dim: int
    key_heads: int | None = None
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    output_gate: bool = False
    norm_epsilon: float = 1e-6
    max_length: int = 2048
    chunk_size: int | None = None
    implementation: Literal["chunk", "cudnn"] | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("width", "heads", "key_dim", "value_dim", "max_length"):
            _at_least_one(name, getattr(self, name))
        _divides_heads(self.key_heads, self.heads)
        for name in ("qk_norm", "output_gate"):
            checks.flag(name, getattr(self, name))
        _positive("norm_epsilon", self.norm_epsilon)
        if self.key_dim % 2:
            raise ValueError(f"key_dim: got {self.key_dim}, expected an even number: rotary positions rotate pairs")
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
        """Hk, the number of key and value heads."""
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
"""{rule: the fields of its `MixerConfig`}, for `mixer_config`; "transformer" has those of an `AttentionConfig`."""


def mixer_config(rule: str, **fields: Any) -> MixerConfig | AttentionConfig:
    """Return the configuration of a named rule's mixer.

    Args:
        rule: a key of `nn.RULES`, such as "osdn" or "gated_delta_net"; "transformer" is softmax attention.
        **fields: sizes and options of `MixerConfig` ("transformer": `AttentionConfig`); they override the rule's.

    Raises:
        ValueError: an unknown rule, or a field out of range.
        TypeError: an unknown or missing field.

    Example:
        >>> mixer = mixer_config("os_gdn", width=64, heads=4, key_dim=16, value_dim=16, key_heads=2)
        >>> mixer.decay, mixer.preconditioner, mixer.hypergradient.eta
        ('scalar', 'hypergradient', 0.003)
    """
    _one_of("rule", rule, tuple(RULES))
    config = AttentionConfig if rule == TRANSFORMER else MixerConfig
    return config(**{**RULES[rule], **fields})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A causal language model, `nn.CausalLM`: embedding, blocks of mixer and MLP, norm, head.

    Args:
        vocab_size: number of vocabulary entries.
        layers: number of blocks.
        mixer: configuration of the blocks' mixers, which also has the width; `mixer_config` gives one by name.
        mlp_dim: hidden units of the MLPs.
        tied_embeddings: use the embedding as the matrix of the head. Default: False.
        norm_epsilon: of the blocks' norms and the last one. Default: 1e-6.
        dropout: rate on what each mixer and MLP adds to the residual stream. Default: 0.
        dtype: "float32" (the default) or "bfloat16", of activations and matrix products; parameters are float32.
        remat: what each block keeps for its gradient; the rest is recomputed. "none" (the default) keeps everything,
            "blocks" the outputs of matrix products with weights, "full" the block's input only.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.

    Example:
        >>> mixer = mixer_config("osdn", width=64, heads=4, key_dim=16, value_dim=16)
        >>> config = ModelConfig(vocab_size=256, layers=2, mixer=mixer, mlp_dim=128)
        >>> dataclasses.replace(config, layers=4).layers
        4
    """

    vocab_size: int
    layers: int
    mixer: MixerConfig | AttentionConfig
    mlp_dim: int
    tied_embeddings: bool = False
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("vocab_size", "layers", "mlp_dim"):
            _at_least_one(name, getattr(self, name))
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("remat", self.remat, ("none", "blocks", "full"))
        checks.flag("tied_embeddings", self.tied_embeddings)
        _positive("norm_epsilon", self.norm_epsilon)
        _nested(self, "mixer", MixerConfig, AttentionConfig)
        if not 0.0 <= checks.number("dropout", self.dropout) < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected a rate from 0 to below 1")
