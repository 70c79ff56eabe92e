"""The configurations of softmax attention."""

import dataclasses
from typing import Literal

from osdn_jax.nn.config import fields
from osdn_jax.ops import checks


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal softmax attention, by default with rotary positions; `nn.SoftmaxAttention` describes it.

    Args:
        width: D, size of the residual stream.
        heads: H, number of query heads.
        key_dim: K, channels of queries and keys per head.
        value_dim: V, value channels per head.
        key_heads: Hk, number of key and value heads, a divisor of `heads`. Default: `heads`.
        rotary_base: base of the rotary frequencies; None for no positions. Default: 10,000.
        rotary_dim: channels at the start of each head that are rotated, an even number. Default: all of `key_dim`.
        window: tokens that each token sees, itself included (sliding-window attention). Default: None, all.
        qk_norm: normalise queries and keys. Default: False.
        qk_norm_over: "head" (the default), each head by itself; "all", the channels of all heads together.
        qk_norm_offset: constant added to the scale parameters of these norms; 1 in Qwen's models. Default: 0.
        qkv_bias: add a bias to the projections of queries, keys and values. Default: False.
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
    rotary_base: float | None = 10_000.0
    qk_norm: bool = False
    output_gate: bool = False
    norm_epsilon: float = 1e-6
    max_length: int = 2048
    chunk_size: int | None = None
    implementation: Literal["chunk", "cudnn"] | None = None
    rotary_dim: int | None = None
    window: int | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    qk_norm_offset: float = 0.0
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("width", "heads", "key_dim", "value_dim", "max_length"):
            fields.at_least_one(name, getattr(self, name))
        fields.divides_heads(self.key_heads, self.heads)
        for name in ("qk_norm", "output_gate", "qkv_bias"):
            checks.flag(name, getattr(self, name))
        fields.positive("norm_epsilon", self.norm_epsilon)
        self._check_positions()
        fields.one_of("qk_norm_over", self.qk_norm_over, ("head", "all"))
        checks.number("qk_norm_offset", self.qk_norm_offset)
        if not self.qk_norm and (self.qk_norm_over, self.qk_norm_offset) != ("head", 0.0):
            raise ValueError("qk_norm: got False, expected True with qk_norm_over or qk_norm_offset")
        if self.window is not None:
            fields.at_least_one("window", self.window)
        checks.chunk_size(self.chunk_size)
        checks.implementation(self.implementation, ("chunk", "cudnn"))
        if self.implementation == "cudnn" and (self.key_dim != self.value_dim or self.window is not None):
            raise ValueError(
                f"implementation: got 'cudnn' with key_dim={self.key_dim}, value_dim={self.value_dim} and "
                f"window={self.window}, expected it with equal dimensions and window=None"
            )

    def _check_positions(self) -> None:
        if self.rotary_base is None:
            if self.rotary_dim is not None:
                raise ValueError(f"rotary_dim: got {self.rotary_dim} with rotary_base=None, expected None")
            return
        if not checks.number("rotary_base", self.rotary_base) > 1:
            raise ValueError(f"rotary_base: got {self.rotary_base}, expected more than 1")
        name = "key_dim" if self.rotary_dim is None else "rotary_dim"
        rotated = self.key_dim if self.rotary_dim is None else self.rotary_dim
        fields.at_least_one(name, rotated)
        if rotated % 2:
            raise ValueError(f"{name}: got {rotated}, expected an even number: rotary positions rotate pairs")
        if rotated > self.key_dim:
            raise ValueError(f"rotary_dim: got {rotated}, expected at most key_dim = {self.key_dim}")

    @property
    def num_key_heads(self) -> int:
        """Hk, the number of key and value heads."""
        return self.key_heads or self.heads

    @property
    def cache_length(self) -> int:
        """Tokens in a state: `max_length`, or the window if that is shorter."""
        return self.max_length if self.window is None else min(self.max_length, self.window)


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """Causal multi-head latent attention without positions; `nn.LatentAttention` describes it.

    Args:
        width: D, size of the residual stream.
        heads: H, number of heads.
        key_dim: K, channels of queries and keys per head that come from the latent.
        value_dim: V, value channels per head.
        rank: R, channels of the latent that keys and values are projected from.
        shared_key_dim: further key channels, which all heads share. Default: 0.
        query_rank: channels between the two projections of queries of low rank. Default: None, one projection.
        norm_epsilon: of the norms of the latents. Default: 1e-6.
        max_length: tokens that a state holds. Default: 2048.
        chunk_size: queries at a time. Default: 512.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    width: int
    heads: int
    key_dim: int
    value_dim: int
    rank: int
    shared_key_dim: int = 0
    query_rank: int | None = None
    norm_epsilon: float = 1e-6
    max_length: int = 2048
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("width", "heads", "key_dim", "value_dim", "rank", "max_length"):
            fields.at_least_one(name, getattr(self, name))
        if self.query_rank is not None:
            fields.at_least_one("query_rank", self.query_rank)
        shared = self.shared_key_dim
        if not isinstance(shared, int) or isinstance(shared, bool) or shared < 0:
            raise ValueError(f"shared_key_dim: got {shared!r}, expected an int of at least 0")
        fields.positive("norm_epsilon", self.norm_epsilon)
        checks.chunk_size(self.chunk_size)
