"""The configuration of a delta-rule mixer."""

import dataclasses
from typing import Literal

from osdn_jax.nn.config import fields
from osdn_jax.nn.config.preconditioners import GramConfig, HypergradientConfig, SquaresConfig
from osdn_jax.ops import checks
from osdn_jax.ops.delta_rule_operator import IMPLEMENTATIONS

Decay = Literal["none", "scalar", "channel"]
Strength = Literal["scalar", "channel"]
Preconditioner = Literal["none", "hypergradient", "gram", "squares"]
GateActivation = Literal["silu", "sigmoid"]

_FLAGS = (
    "erase",
    "negative_eigenvalues",
    "output_gate",
    "match_step",
    "key_norm",
    "output_gate_bias",
    "beta_per_key_head",
    "preconditioner_per_value_head",
    "decay_scale",
)


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
        preconditioner: how the write key is computed from the key: "none" (the default), "hypergradient", "gram" or
            "squares".
        hypergradient: settings of the hypergradient preconditioner.
        gram: settings of the Gram preconditioner.
        squares: settings of the preconditioner of squared keys.
        match_step: write under k times one number per token, <w, k> / <k, k> for the preconditioner's write key w: the
            step of each write is the preconditioner's and its direction is not. A control for experiments: what a
            preconditioner gains over it comes from its direction. Default: False.
        conv_size: taps of the short convolution; 0 for none. Default: 4.
        key_norm: normalise keys to unit length; queries always are. Default: True.
        negative_eigenvalues: beta, or the erase gate, in (0, 2) instead of (0, 1). Default: False.
        fixed_beta: beta of every token, more than 0, in place of the learned gate. Default: None, the gate.
        beta_per_key_head: one beta per key head, which all its value heads share. Default: False, one per value head.
        decay_rank: channels between the two projections of a decay per channel. Default: `key_dim`.
        decay_bound: lower bound b, below 0, of a decay per channel, whose log is then b sigmoid(exp(A_log) (f +
            dt_bias)). Default: None, -exp(A_log) softplus(f + dt_bias).
        decay_scale: multiply the log decay by |s|, a learned number per head that starts at 1; in a model that gets a
            decay after training, near 0. Default: False.
        preconditioner_per_value_head: one preconditioner per value head in place of one per key head. Default: False.
        output_gate: multiply the normalised output by a gate of the input. Default: False.
        output_gate_rank: channels between the two projections of a gate of low rank. Default: None, one projection.
        output_gate_bias: add a bias to the output gate. Default: False.
        output_gate_activation: "silu" (the default) or "sigmoid".
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
    hypergradient: HypergradientConfig = dataclasses.field(default_factory=HypergradientConfig)
    gram: GramConfig = dataclasses.field(default_factory=GramConfig)
    conv_size: int = 4
    negative_eigenvalues: bool = False
    output_gate: bool = False
    norm_epsilon: float = 1e-6
    chunk_size: int | None = None
    implementation: str | None = None
    match_step: bool = False
    key_norm: bool = True
    fixed_beta: float | None = None
    squares: SquaresConfig = dataclasses.field(default_factory=SquaresConfig)
    output_gate_rank: int | None = None
    output_gate_bias: bool = False
    output_gate_activation: GateActivation = "silu"
    beta_per_key_head: bool = False
    decay_rank: int | None = None
    decay_bound: float | None = None
    preconditioner_per_value_head: bool = False
    decay_scale: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("width", "heads", "key_dim", "value_dim"):
            fields.at_least_one(name, getattr(self, name))
        if not isinstance(self.conv_size, int) or isinstance(self.conv_size, bool) or self.conv_size < 0:
            raise ValueError(f"conv_size: got {self.conv_size!r}, expected an int of at least 0")
        fields.divides_heads(self.key_heads, self.heads)
        fields.one_of("decay", self.decay, ("none", "scalar", "channel"))
        fields.one_of("strength", self.strength, ("scalar", "channel"))
        fields.one_of("preconditioner", self.preconditioner, ("none", "hypergradient", "gram", "squares"))
        for name in _FLAGS:
            checks.flag(name, getattr(self, name))
        fields.positive("norm_epsilon", self.norm_epsilon)
        fields.nested(self, "hypergradient", HypergradientConfig)
        fields.nested(self, "gram", GramConfig)
        fields.nested(self, "squares", SquaresConfig)
        checks.chunk_size(self.chunk_size)
        checks.implementation(self.implementation, IMPLEMENTATIONS)
        if not self.erase and self.preconditioner != "none":
            raise ValueError(f"preconditioner: got {self.preconditioner!r} with erase=False, expected 'none'")
        if self.match_step and self.preconditioner == "none":
            raise ValueError("match_step: got True with preconditioner='none', expected a preconditioner to match")
        self._check_gates()
        self._check_fixed_beta()
        if self.strength == "channel" and (self.erase, self.decay, self.preconditioner) != (True, "channel", "none"):
            raise ValueError(
                f"strength: got 'channel' with erase={self.erase}, decay={self.decay!r} and "
                f"preconditioner={self.preconditioner!r}, expected it with erase=True, decay='channel' and "
                "preconditioner='none'"
            )

    def _check_gates(self) -> None:
        fields.one_of("output_gate_activation", self.output_gate_activation, ("silu", "sigmoid"))
        for name, unset in (
            ("output_gate_rank", None),
            ("output_gate_bias", False),
            ("output_gate_activation", "silu"),
        ):
            if not self.output_gate and getattr(self, name) != unset:
                raise ValueError(f"{name}: got {getattr(self, name)!r} with output_gate=False, expected {unset!r}")
        for name in ("output_gate_rank", "decay_rank"):
            if getattr(self, name) is not None:
                fields.at_least_one(name, getattr(self, name))
        for name in ("decay_rank", "decay_bound"):
            if self.decay != "channel" and getattr(self, name) is not None:
                raise ValueError(f"{name}: got {getattr(self, name)!r} with decay={self.decay!r}, expected None")
        if self.decay_scale and self.decay == "none":
            raise ValueError("decay_scale: got True with decay='none', expected a decay to scale")
        if self.decay_bound is not None and not checks.number("decay_bound", self.decay_bound) < 0:
            raise ValueError(f"decay_bound: got {self.decay_bound}, expected None or a number below 0")
        if self.beta_per_key_head and (self.fixed_beta is not None or not self.gated_write):
            raise ValueError("beta_per_key_head: got True, expected it for a rule with a learned beta per token")

    def _check_fixed_beta(self) -> None:
        if self.fixed_beta is None:
            return
        fields.positive("fixed_beta", self.fixed_beta)
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
        return self.heads if aware or self.preconditioner_per_value_head else self.num_key_heads
