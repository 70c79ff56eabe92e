"""The configuration of a language model: a stack of blocks, each with a mixer and an MLP."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from osdn_jax.nn.config import fields
from osdn_jax.nn.config.attention import AttentionConfig, LatentAttentionConfig
from osdn_jax.nn.config.mixer import MixerConfig
from osdn_jax.nn.config.mlp import MixtureConfig, MLPConfig
from osdn_jax.nn.config.preconditioners import GramConfig, HypergradientConfig, SquaresConfig
from osdn_jax.ops import checks

# Rematerialisation, what a block keeps for its gradient: everything, the outputs of its matrix products with weights
# ("blocks"), or its input only ("full").
Remat = Literal["none", "blocks", "full"]


Mixer = MixerConfig | AttentionConfig | LatentAttentionConfig
MLP = MLPConfig | MixtureConfig


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A block of a language model: a mixer and an MLP, each with a norm and a residual connection.

    Args:
        mixer: the token mixer: of the delta-rule family, softmax attention or latent attention.
        mlp: a gated MLP or a mixture of experts.
        norm: "pre" (the default) for x + f(norm(x)), "post" for x + norm(f(x)).

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    mixer: Mixer
    mlp: MLP
    norm: Literal["pre", "post"] = "pre"

    def __post_init__(self) -> None:
        """Check the fields; the configurations may be dicts, as `dataclasses.asdict` writes them."""
        fields.nested(self, "mixer", MixerConfig, AttentionConfig, LatentAttentionConfig)
        fields.nested(self, "mlp", MLPConfig, MixtureConfig)
        fields.one_of("norm", self.norm, ("pre", "post"))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A causal language model, `nn.CausalLM`: embedding, blocks of mixer and MLP, norm, head.

    Equal blocks are given by `layers`, `mixer` and `mlp_dim`, different ones (a hybrid) by `blocks`.

    Args:
        vocab_size: number of vocabulary entries.
        layers: number of blocks. Default: that of `blocks`.
        mixer: configuration of the blocks' mixers, which also has the width; `mixer_config` gives one by name. Default:
            None, with `blocks`.
        mlp_dim: hidden units of the MLPs. Default: None, with `blocks`.
        tied_embeddings: use the embedding as the matrix of the head. Default: False.
        norm_epsilon: of the blocks' norms and the last one. Default: 1e-6.
        dropout: rate on what each mixer and MLP adds to the residual stream. Default: 0.
        dtype: "float32" (the default) or "bfloat16", of activations and matrix products; parameters are float32.
        remat: what each block keeps for its gradient; the rest is recomputed. "none" (the default) keeps everything,
            "blocks" the outputs of matrix products with weights, "full" the block's input only.
        blocks: one `BlockConfig` per block, in place of `mixer` and `mlp_dim`. Default: None.
        norm_offset: constant added to the scale parameters of the blocks' norms and the last one; 1 in Qwen's models.
            Default: 0.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.

    Example:
        >>> from osdn_jax.nn import mixer_config
        >>> mixer = mixer_config("osdn", width=64, heads=4, key_dim=16, value_dim=16)
        >>> config = ModelConfig(vocab_size=256, layers=2, mixer=mixer, mlp_dim=128)
        >>> dataclasses.replace(config, layers=4).layers
        4

        A hybrid of three blocks with a delta rule and one with attention:

        >>> attention = mixer_config("transformer", width=64, heads=4, key_dim=16, value_dim=16)
        >>> delta, softmax = (BlockConfig(m, MLPConfig(128)) for m in (mixer, attention))
        >>> ModelConfig(vocab_size=256, blocks=(delta, delta, delta, softmax)).layers
        4
    """

    vocab_size: int
    layers: int | None = None
    mixer: Mixer | None = None
    mlp_dim: int | None = None
    tied_embeddings: bool = False
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    blocks: tuple[BlockConfig, ...] | None = None
    norm_offset: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields; blocks may be a list, and configurations dicts, as in JSON."""
        fields.at_least_one("vocab_size", self.vocab_size)
        if self.blocks is None:
            for name in ("layers", "mlp_dim"):
                fields.at_least_one(name, getattr(self, name))
            fields.nested(self, "mixer", MixerConfig, AttentionConfig, LatentAttentionConfig)
        else:
            self._check_blocks()
        checks.number("norm_offset", self.norm_offset)
        fields.one_of("dtype", self.dtype, ("float32", "bfloat16"))
        fields.one_of("remat", self.remat, ("none", "blocks", "full"))
        checks.flag("tied_embeddings", self.tied_embeddings)
        fields.positive("norm_epsilon", self.norm_epsilon)
        if not 0.0 <= checks.number("dropout", self.dropout) < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected a rate from 0 to below 1")

    def with_max_length(self, max_length: int) -> "ModelConfig":
        """Return the configuration with caches of attention for this number of tokens.

        Args:
            max_length: tokens that a state of every attention holds.

        Raises:
            ValueError: max_length is below 1.
        """

        def sized(mixer: Mixer) -> Mixer:
            return mixer if isinstance(mixer, MixerConfig) else dataclasses.replace(mixer, max_length=max_length)

        if self.blocks is None:
            return dataclasses.replace(self, mixer=sized(cast(Mixer, self.mixer)))
        blocks = tuple(dataclasses.replace(block, mixer=sized(block.mixer)) for block in self.blocks)
        return dataclasses.replace(self, blocks=blocks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Return the configuration that `dataclasses.asdict` wrote, also after JSON made lists of tuples.

        Args:
            values: {field: value}, with dicts for configurations.

        Raises:
            ValueError: a field is out of range.
            TypeError: an unknown field, or one of another type.

        Example:
            >>> from osdn_jax.nn import mixer_config
            >>> mixer = mixer_config("osdn", width=64, heads=4, key_dim=16, value_dim=16)
            >>> config = ModelConfig(vocab_size=256, layers=2, mixer=mixer, mlp_dim=128)
            >>> ModelConfig.from_dict(dataclasses.asdict(config)) == config
            True
        """
        return cls(**{name: _value(name, value) for name, value in values.items()})

    def _check_blocks(self) -> None:
        if self.mixer is not None or self.mlp_dim is not None:
            raise ValueError("blocks: got some in addition to mixer or mlp_dim, expected one or the other")
        if not isinstance(self.blocks, (tuple, list)) or not self.blocks:
            raise TypeError(f"blocks: got {self.blocks!r}, expected a tuple of at least one BlockConfig")
        blocks = tuple(BlockConfig(**block) if isinstance(block, dict) else block for block in self.blocks)
        for i, block in enumerate(blocks):
            if not isinstance(block, BlockConfig):
                raise TypeError(f"blocks: got {type(block).__name__} at {i}, expected a BlockConfig")
            if block.mixer.width != blocks[0].mixer.width:
                raise ValueError(
                    f"blocks: got width {block.mixer.width} at {i}, expected that of block 0, {blocks[0].mixer.width}"
                )
        if self.layers not in (None, len(blocks)):
            raise ValueError(f"layers: got {self.layers} with {len(blocks)} blocks, expected their number or None")
        object.__setattr__(self, "blocks", blocks)
        object.__setattr__(self, "layers", len(blocks))

    @property
    def width(self) -> int:
        """D, the size of the residual stream."""
        return self.counted[0][0].mixer.width

    @property
    def stack(self) -> tuple[BlockConfig, ...]:
        """The configuration of each block."""
        if self.blocks is not None:
            return self.blocks
        return (BlockConfig(cast(Mixer, self.mixer), MLPConfig(cast(int, self.mlp_dim))),) * self.depth

    @property
    def counted(self) -> tuple[tuple[BlockConfig, int], ...]:
        """The different blocks with their numbers, however many there are."""
        if self.blocks is not None:
            return tuple(collections.Counter(self.blocks).items())
        return ((BlockConfig(cast(Mixer, self.mixer), MLPConfig(cast(int, self.mlp_dim))), self.depth),)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return cast(int, self.layers)

    @property
    def is_uniform(self) -> bool:
        """True if all blocks are equal."""
        return len(self.counted) == 1


# The configurations that a field of a configuration may hold.
_NESTED: dict[str, tuple[type[Any], ...]] = {
    "mixer": (MixerConfig, AttentionConfig, LatentAttentionConfig),
    "mlp": (MLPConfig, MixtureConfig),
    "hypergradient": (HypergradientConfig,),
    "gram": (GramConfig,),
    "squares": (SquaresConfig,),
}


def _value(name: str, value: Any) -> Any:
    """Return the value of a field as the constructors take it."""
    if name == "blocks" and isinstance(value, list | tuple):
        return tuple(
            BlockConfig(**{key: _value(key, inner) for key, inner in block.items()})
            if isinstance(block, dict)
            else block
            for block in value
        )
    if name == "bounds" and isinstance(value, list):
        return tuple(value)
    if name in _NESTED and value is not None and not isinstance(value, _NESTED[name]):
        kind = fields.chosen(name, value, *_NESTED[name])
        return kind(**{key: _value(key, inner) for key, inner in value.items()})
    return value
