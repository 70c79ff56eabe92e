"""OLMo Hybrid of Transformers: Gated DeltaNet in pre-norm blocks, attention in post-norm blocks."""

from collections.abc import Collection, Mapping
from typing import Any

from osdn_jax.interop.families.rotary import rotary
from osdn_jax.interop.families.tables import NO_TOKENS, apart, frame, layer_types, mixers_of, swiglu
from osdn_jax.interop.family import Family
from osdn_jax.interop.mapping import Row, fused, linear, same
from osdn_jax.interop.options import MANY, Options
from osdn_jax.nn.config import AttentionConfig, BlockConfig, Mixer, MixerConfig, MLPConfig, ModelConfig

_KINDS = ("linear_attention", "full_attention")
_OUTPUT_EPSILON = 1e-5  # of the norm of a delta layer's output, in every checkpoint


def describe(config: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of an olmo_hybrid."""
    options = Options(config)
    width = options.integer("hidden_size", 3840)
    epsilon = options.number("rms_norm_eps", 1e-6)
    mlp = MLPConfig(options.integer("intermediate_size", 11008))
    layers = options.integer("num_hidden_layers", 32, most=MANY)
    options.require("hidden_act", "silu")
    options.require("attention_bias", False)
    options.require("linear_use_gate", True)  # of early configurations
    options.without_effect("max_position_embeddings", "linear_a_log_min", "linear_a_log_max")
    options.without_effect("linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
    heads = options.integer("num_attention_heads", 30)
    mixers: dict[str, Mixer] = {
        "linear_attention": _delta(options, width, heads),
        "full_attention": _attention(options, width, heads, epsilon),
    }
    kinds = options.words("layer_types", layers, _KINDS)
    if kinds is None:
        kinds = [_KINDS[1] if i % 4 == 3 else _KINDS[0] for i in range(layers)]
        kinds[-1] = _KINDS[1] if _KINDS[1] not in kinds else kinds[-1]
    vocab_size = options.integer("vocab_size", 100352)
    tied = options.flag("tie_word_embeddings", False)
    options.finish()
    blocks = tuple(BlockConfig(mixers[kind], mlp, "pre" if kind == _KINDS[0] else "post") for kind in kinds)
    return ModelConfig(vocab_size, blocks=blocks, tied_embeddings=tied, norm_epsilon=epsilon)


def _delta(options: Options, width: int, attention_heads: int) -> MixerConfig:
    key_heads = options.integer("linear_num_key_heads", attention_heads)
    heads = options.integer("linear_num_value_heads", attention_heads)
    options.divisor("linear_num_key_heads", key_heads, "linear_num_value_heads", heads)
    key_dim = options.integer("linear_key_head_dim", int(0.75 * width / key_heads))
    return MixerConfig(
        width,
        heads=heads,
        key_dim=key_dim,
        value_dim=options.integer("linear_value_head_dim", 2 * key_dim),
        key_heads=key_heads if heads % key_heads == 0 else heads,
        decay="scalar",
        output_gate=True,
        conv_size=options.integer("linear_conv_kernel_dim", 4),
        negative_eigenvalues=options.flag("linear_allow_neg_eigval", True),
        norm_epsilon=_OUTPUT_EPSILON,
    )


def _attention(options: Options, width: int, heads: int, epsilon: float) -> AttentionConfig:
    key_heads = options.integer("num_key_value_heads", heads)
    options.divisor("num_key_value_heads", key_heads, "num_attention_heads", heads)
    if "head_dim" not in options:
        options.divisor("num_attention_heads", heads, "hidden_size", width)
    head_dim = options.integer("head_dim", max(width // heads, 1))
    base, rotated = rotary(options, head_dim, 1.0)
    if rotated is not None:
        options.problem("partial_rotary_factor", rotated / head_dim, "1: the whole head is rotated")
    return AttentionConfig(
        width,
        heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        key_heads=key_heads if heads % key_heads == 0 else heads,
        rotary_base=base,
        qk_norm=True,
        qk_norm_over="all",
        norm_epsilon=epsilon,
    )


def rows(config: ModelConfig, source: Mapping[str, Any], keys: Collection[str]) -> list[Row]:
    """Return the rows of a model. The names of norms differ between the released files and those of Transformers."""
    table = frame(config, "model.embed_tokens.weight", "model.norm.weight")
    for i, block in enumerate(config.stack):
        layer, path = f"model.layers.{i}.", f"blocks/{i}/"
        table += swiglu(f"{layer}mlp.", f"{path}mlp/", block.mlp.hidden)
        if isinstance(block.mixer, AttentionConfig):
            table += [
                same(
                    f"{layer}post_attention_layernorm.weight",
                    f"{path}mixer_norm/scale",
                    also=(f"{layer}feedforward_layer_norm.weight",),
                ),
                same(f"{layer}post_feedforward_layernorm.weight", f"{path}mlp_norm/scale"),
                *_attention_rows(block.mixer, f"{layer}self_attn.", f"{path}mixer/"),
            ]
        elif isinstance(block.mixer, MixerConfig):
            table += [
                same(
                    f"{layer}attention_layer_norm.weight",
                    f"{path}mixer_norm/scale",
                    also=(f"{layer}input_layernorm.weight",),
                ),
                same(
                    f"{layer}feedforward_layer_norm.weight",
                    f"{path}mlp_norm/scale",
                    also=(f"{layer}post_attention_layernorm.weight",),
                ),
                *_delta_rows(block.mixer, f"{layer}linear_attn.", f"{path}mixer/"),
            ]
    return table


def _delta_rows(mixer: MixerConfig, keys: str, path: str) -> list[Row]:
    return [
        *apart(mixer, keys, path, any_widths=True),
        linear(f"{keys}a_proj.weight", f"{path}decay/project/kernel"),
        linear(f"{keys}b_proj.weight", f"{path}beta/kernel"),
        linear(f"{keys}g_proj.weight", f"{path}gate/kernel"),
        linear(f"{keys}o_proj.weight", f"{path}output/kernel"),
        same(f"{keys}A_log", f"{path}decay/log_rate"),
        same(f"{keys}dt_bias", f"{path}decay/bias"),
        same(f"{keys}o_norm.weight", f"{path}norm/scale"),
    ]


def _attention_rows(mixer: AttentionConfig, keys: str, path: str) -> list[Row]:
    shared = mixer.num_key_heads * mixer.key_dim
    widths = {"q": mixer.heads * mixer.key_dim, "k": shared, "v": shared}
    return [
        fused({f"{keys}{name}_proj.weight": width for name, width in widths.items()}, f"{path}project/kernel"),
        same(f"{keys}q_norm.weight", f"{path}query_norm/scale"),
        same(f"{keys}k_norm.weight", f"{path}key_norm/scale"),
        linear(f"{keys}o_proj.weight", f"{path}output/kernel"),
    ]


def express(config: ModelConfig) -> dict[str, Any]:
    """Return config.json of a model. Raises ValueError for layers of one kind only, which Transformers refuses."""
    if len(set(layer_types(config))) < 2:
        raise ValueError("layout: 'olmo_hybrid' needs layers of both kinds, a delta rule and attention")
    delta, attention = mixers_of(config, AttentionConfig)
    return {
        "model_type": "olmo_hybrid",
        "architectures": ["OlmoHybridForCausalLM"],
        **NO_TOKENS,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.stack[0].mlp.hidden,
        "num_hidden_layers": config.depth,
        "layer_types": layer_types(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_key_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rotary_base},
        "linear_num_key_heads": delta.num_key_heads,
        "linear_num_value_heads": delta.heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv_size,
        "linear_allow_neg_eigval": delta.negative_eigenvalues,
    }


FAMILY = Family("olmo_hybrid", "Transformers", describe, rows, express=express)
