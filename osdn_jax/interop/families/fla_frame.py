"""The shared parts of flash-linear-attention's models: embedding, blocks, attention layers, MLP and head.

Read from version 0.6.0 (github.com/fla-org/flash-linear-attention).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

from osdn_jax.interop.family import Rows
from osdn_jax.interop.mapping import Key, Row, fused, linear, same
from osdn_jax.interop.options import MANY, Options
from osdn_jax.nn.config import AttentionConfig, BlockConfig, MixerConfig, MLPConfig, ModelConfig

LIBRARY = "flash-linear-attention"

_WITHOUT_EFFECT = (
    "attn_mode",
    "fuse_norm",
    "fuse_swiglu",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "use_l2warp",
    "max_position_embeddings",
)
_SPECIFICATION = ("layers", "num_heads", "num_kv_heads", "qkv_bias", "window_size", "rope_theta")  # entries of `attn`
_ACTIVATIONS = {"swish": "silu", "powlu": "powlu"}  # of the MLP: {name in config.json: name here}

# (options, width, epsilon of the norms) -> the delta rule's mixer
DescribeMixer = Callable[[Options, int, float], MixerConfig]
# (mixer, prefix of tensors, prefix of parameters) -> the mixer's rows
MixerRows = Callable[[MixerConfig, str, str], Sequence[Row]]


def describe_model(
    config: Mapping[str, Any],
    mixer: DescribeMixer,
    *,
    layers: int,
    attention_lists: bool = False,
    ignored: Collection[str] = (),
) -> ModelConfig:
    """Return the configuration of a model from the entries of its config.json.

    Args:
        config: the entries.
        mixer: reads the options of the delta rule.
        layers: default of num_hidden_layers.
        attention_lists: `attn` may be a list of specifications.
        ignored: further entries that change no logits.

    Raises:
        ValueError: entries are unknown, or this package cannot serve them; all are listed.
    """
    options = Options(config)
    options.without_effect(*_WITHOUT_EFFECT, *ignored)
    options.require("attnres_block_size")  # residual connections to several earlier layers
    width = options.integer("hidden_size", 2048)
    epsilon = options.number("norm_eps", 1e-6)
    depth = options.integer("num_hidden_layers", layers, most=MANY)
    attention = _attention_layers(options, width, depth, lists=attention_lists)
    mlp = MLPConfig(_hidden_units(options, width), cast(Any, _activation(options)))
    vocabulary = options.integer("vocab_size", 32000)
    tied = options.flag("tie_word_embeddings", False)
    delta = mixer(options, width, epsilon)
    options.finish()
    blocks = tuple(BlockConfig(attention.get(i, delta), mlp) for i in range(depth))
    return ModelConfig(vocabulary, blocks=blocks, tied_embeddings=tied, norm_epsilon=epsilon)


def model_rows(mixer_rows: MixerRows) -> Rows:
    """Return the function of a family from a configuration to the rows of all its parameters.

    Args:
        mixer_rows: the rows of one mixer of the delta rule.
    """

    def rows(config: ModelConfig, source: Mapping[str, Any], keys: Collection[str]) -> list[Row]:
        tied = ("lm_head.weight",) if config.tied_embeddings else ()
        table = [same("model.embeddings.weight", "embedding/embedding", copies=tied)]
        for i, block in enumerate(config.stack):
            tensors, parameters = f"model.layers.{i}.", f"blocks/{i}/"
            table += _block_rows(block, tensors, parameters)
            if isinstance(block.mixer, AttentionConfig):
                table += _attention_rows(block.mixer, f"{tensors}attn.", f"{parameters}mixer/")
            else:
                table += mixer_rows(cast(MixerConfig, block.mixer), f"{tensors}attn.", f"{parameters}mixer/")
        table.append(same("model.norm.weight", "norm/scale"))
        return table if config.tied_embeddings else [*table, linear("lm_head.weight", "head/kernel")]

    return rows


def express_frame(config: ModelConfig) -> tuple[dict[str, Any], MixerConfig]:
    """Return the entries of a config.json that all models have, and the one mixer of the delta rule.

    Raises:
        ValueError: the blocks differ in more than attention or delta rule, or there is no delta rule.
    """
    deltas = {block.mixer for block in config.stack if isinstance(block.mixer, MixerConfig)}
    mlps = {block.mlp for block in config.stack}
    (mlp, *_), names = mlps, {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    if len(deltas) != 1 or len(mlps) != 1 or not isinstance(mlp, MLPConfig):
        raise ValueError(
            f"layout: got a model with {len(deltas)} different mixers of the delta rule and {len(mlps)} different MLPs "
            f"({type(mlp).__name__}), expected one of each, and a gated MLP"
        )
    entries = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "vocab_size": config.vocab_size,
        "intermediate_size": mlp.hidden,
        "hidden_act": names[mlp.activation],
        "norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "attn": _express_attention(config),
    }
    return entries, deltas.pop()


def _hidden_units(options: Options, width: int) -> int:
    """Return the hidden units of the MLP: given, or 2/3 of a ratio to the width, rounded up to a multiple of 256."""
    ratio = options.number("hidden_ratio", 4)
    given = options.integer("intermediate_size", None)
    return given or 256 * math.ceil(int(width * ratio * 2 / 3) / 256)


def _activation(options: Options) -> str:
    return _ACTIVATIONS.get(options.choice("hidden_act", "swish", _ACTIVATIONS), "silu")


def _attention_layers(options: Options, width: int, depth: int, *, lists: bool) -> dict[int, AttentionConfig]:
    """Return {layer: its attention} of the entry `attn`, one specification or, where lists are known, several."""
    found = options.any("attn")
    if found is None:
        return {}
    specifications = found if lists and isinstance(found, list) else [found]
    layers: dict[int, AttentionConfig] = {}
    for i, specification in enumerate(specifications):
        name = "attn" if specifications is not found else f"attn[{i}]"
        if not isinstance(specification, dict):
            options.problem(name, specification, "an object" + (" or a list of objects" if lists else ""))
            continue
        inner = Options({f"{name}.{key}": value for key, value in specification.items()})
        chosen = inner.any(f"{name}.layers")
        attention = _attention(inner, name, width)
        unknown = [key for key in specification if key not in _SPECIFICATION]
        for key in unknown:
            inner.problem(f"{name}.{key}", specification[key], "no such option: it is unknown here")
        options.problems += inner.problems
        if not isinstance(chosen, list) or not all(type(layer) is int and 0 <= layer < depth for layer in chosen):
            options.problem(f"{name}.layers", chosen, f"a list of layers from 0 to {depth - 1}")
            continue
        repeated = [layer for layer in chosen if layer in layers or chosen.count(layer) > 1]
        if repeated:
            options.problem(f"{name}.layers", chosen, f"each layer once, not {repeated[0]} again")
        if attention is not None:
            layers |= dict.fromkeys(chosen, attention)
    return layers


def _attention(options: Options, name: str, width: int) -> AttentionConfig | None:
    """Return the attention of one specification, or None if there are problems."""
    heads = options.integer(f"{name}.num_heads")
    key_heads = options.integer(f"{name}.num_kv_heads", heads)
    bias = options.flag(f"{name}.qkv_bias", False)
    window = options.integer(f"{name}.window_size", None)
    base = options.number(f"{name}.rope_theta", 10_000.0, above=1.0)
    if options.problems:
        return None
    head = width // heads  # whatever the heads of the delta rule are
    if width % heads or head % 2:
        options.problem(f"{name}.num_heads", heads, f"a divisor of hidden_size = {width} with an even quotient")
    if heads % key_heads:
        options.problem(f"{name}.num_kv_heads", key_heads, f"a divisor of num_heads = {heads}")
    if options.problems:
        return None
    return AttentionConfig(
        width, heads, head, head, key_heads=key_heads, rotary_base=base, window=window, qkv_bias=bias
    )


def _express_attention(config: ModelConfig) -> Any:
    """Return the entry `attn`: null, one specification, or a list of those."""
    layers: dict[AttentionConfig, list[int]] = {}
    for i, block in enumerate(config.stack):
        if isinstance(block.mixer, AttentionConfig):
            layers.setdefault(block.mixer, []).append(i)
    specifications = [
        {
            "layers": numbers,
            "num_heads": attention.heads,
            "num_kv_heads": attention.num_key_heads,
            "qkv_bias": attention.qkv_bias,
            "window_size": attention.window,
            "rope_theta": attention.rotary_base,
        }
        for attention, numbers in layers.items()
    ]
    return specifications if len(specifications) > 1 else next(iter(specifications), None)


def _block_rows(block: BlockConfig, tensors: str, parameters: str) -> list[Row]:
    hidden = cast(MLPConfig, block.mlp).hidden
    gate_and_up = {f"{tensors}mlp.gate_proj.weight": hidden, f"{tensors}mlp.up_proj.weight": hidden}
    return [
        same(f"{tensors}attn_norm.weight", f"{parameters}mixer_norm/scale"),
        same(f"{tensors}mlp_norm.weight", f"{parameters}mlp_norm/scale"),
        fused(gate_and_up, f"{parameters}mlp/gate_and_up/kernel"),
        linear(f"{tensors}mlp.down_proj.weight", f"{parameters}mlp/down/kernel"),
    ]


def _attention_rows(config: AttentionConfig, tensors: str, parameters: str) -> list[Row]:
    shared = config.num_key_heads * config.key_dim
    widths = {"q_proj": config.heads * config.key_dim, "k_proj": shared, "v_proj": shared}
    rows = [
        fused({f"{tensors}{name}.weight": size for name, size in widths.items()}, f"{parameters}project/kernel"),
        linear(f"{tensors}o_proj.weight", f"{parameters}output/kernel"),
    ]
    if config.qkv_bias:
        biases = tuple(Key(f"{tensors}{name}.bias", {name: size}) for name, size in widths.items())
        rows.append(Row(biases, {f"{parameters}project/bias": tuple(widths)}, transpose=False))
    return rows
