"""Kimi Linear, as released and as Transformers saves it: KDA, latent attention without positions, experts."""

from collections.abc import Collection, Mapping
from typing import Any

from osdn_jax.interop.families.tables import NO_TOKENS, apart, experts, frame, layer_types, mixers_of, swiglu
from osdn_jax.interop.family import Family
from osdn_jax.interop.mapping import Row, empty, linear, same
from osdn_jax.interop.options import MANY, Options
from osdn_jax.nn.config import (
    BlockConfig,
    LatentAttentionConfig,
    Mixer,
    MixerConfig,
    MixtureConfig,
    MLPConfig,
    ModelConfig,
)

_KINDS = ("linear_attention", "full_attention")
_LATENT_EPSILON = 1e-6  # of the norms of latents, in every checkpoint


def describe(config: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of a kimi_linear, whose options have the released names or those of Transformers."""
    options = Options(config)
    width = options.integer("hidden_size", 2304)
    epsilon = options.number("rms_norm_eps", 1e-5)
    layers = options.integer("num_hidden_layers", 27, most=MANY)
    options.require("hidden_act", "silu")
    options.require("attention_bias", False)
    options.require("mla_use_nope", True)
    options.require("num_nextn_predict_layers", 0)
    # The attention has no positions, so the entries for them change nothing; the head is never tied.
    options.without_effect("tie_word_embeddings")
    options.without_effect("rope_theta", "rope_scaling", "rope_parameters", "rope_interleave", "head_dim")
    options.without_effect("qk_head_dim", "max_position_embeddings", "model_max_length", "output_router_logits")
    released = options.section("linear_attn_config")
    mixers: dict[str, Mixer] = {
        "linear_attention": _delta(options, released, width, epsilon),
        "full_attention": _latent(options, width),
    }
    dense, sparse = MLPConfig(options.integer("intermediate_size", 9216)), _mixture(options)
    kinds, sparse_layers = _layer_kinds(options, released, layers), _sparse_layers(options, layers)
    vocab_size = options.integer("vocab_size", 163840)
    options.finish()
    blocks = tuple(
        BlockConfig(mixers[kind], sparse if is_sparse else dense)
        for kind, is_sparse in zip(kinds, sparse_layers, strict=True)
    )
    return ModelConfig(vocab_size, blocks=blocks, norm_epsilon=epsilon)


def _delta(options: Options, released: Options, width: int, epsilon: float) -> MixerConfig:
    heads = options.integer("linear_num_heads", 32)
    head_dim = options.integer("linear_head_dim", 128)
    conv_size = options.integer("linear_conv_kernel_dim", 4)
    head_dim = released.integer("head_dim", head_dim)
    return MixerConfig(
        width,
        heads=released.integer("num_heads", heads),
        key_dim=head_dim,
        value_dim=head_dim,
        decay="channel",
        output_gate=True,
        output_gate_rank=head_dim,
        output_gate_activation="sigmoid",
        conv_size=released.integer("short_conv_kernel_size", conv_size),
        norm_epsilon=epsilon,
    )


def _latent(options: Options, width: int) -> LatentAttentionConfig:
    heads = options.integer("num_attention_heads", 32)
    options.require("num_key_value_heads", heads)
    return LatentAttentionConfig(
        width,
        heads=heads,
        key_dim=options.integer("qk_nope_head_dim", 128),
        value_dim=options.integer("v_head_dim", 128),
        rank=options.integer("kv_lora_rank", 512),
        shared_key_dim=options.integer("qk_rope_head_dim", 64, least=0),
        query_rank=options.integer("q_lora_rank", None),
        norm_epsilon=_LATENT_EPSILON,
    )


def _mixture(options: Options) -> MixtureConfig:
    count = options.integer(options.name_of("num_experts", "num_local_experts"), 256, most=MANY)
    active = options.integer(options.name_of("num_experts_per_token", "num_experts_per_tok"), 8)
    hidden = options.integer("moe_intermediate_size", 1024)
    shared = options.integer(options.name_of("num_shared_experts", "n_shared_experts"), 1, least=0)
    groups = options.integer(options.name_of("num_expert_group", "n_group"), 1)
    active_groups = options.integer("topk_group", 1)
    renormalize = options.flag(options.name_of("moe_renormalize", "norm_topk_prob"), True)
    scale = options.number("routed_scaling_factor", 2.446)
    options.require("moe_router_activation_func", "sigmoid")
    options.require("use_grouped_topk", True)
    options.require("topk_method", "noaux_tc")
    try:
        return MixtureConfig(
            count,
            active,
            hidden,
            router="sigmoid",
            renormalize=renormalize,
            groups=groups,
            active_groups=active_groups,
            scale=scale,
            shared_hidden=shared * hidden,
        )
    except ValueError as error:
        options.problems.append(f"num_experts, num_experts_per_token, num_expert_group or topk_group: {error}")
        return MixtureConfig(1, 1, hidden)


def _layer_kinds(options: Options, released: Options, layers: int) -> list[str]:
    """Return the kind of each layer: by `layer_types`, or the released lists, whose layers are counted from 1."""
    kinds = options.words("layer_types", layers, _KINDS)
    attention = released.indices("full_attn_layers", layers, 1)
    delta = released.indices("kda_layers", layers, 1)
    if kinds is not None:
        return kinds
    if not attention and not delta:
        return [_KINDS[1] if i and i % 4 == 0 else _KINDS[0] for i in range(layers)]
    if sorted(attention + delta) != list(range(layers)):
        released.problem("kda_layers", released.any("kda_layers"), "each layer once, here or in full_attn_layers")
    return [_KINDS[1] if i in attention else _KINDS[0] for i in range(layers)]


def _sparse_layers(options: Options, layers: int) -> list[bool]:
    """Return for each layer whether it has experts."""
    first = options.integer("first_k_dense_replace", 1, least=0)
    step = options.integer("moe_layer_freq", 1)
    kinds = options.words("mlp_layer_types", layers, ("dense", "sparse"))
    return [kind == "sparse" for kind in kinds] if kinds else [i >= first and i % step == 0 for i in range(layers)]


def rows(config: ModelConfig, source: Mapping[str, Any], keys: Collection[str]) -> list[Row]:
    """Return the rows of a model."""
    table = frame(config, "model.embed_tokens.weight", "model.norm.weight")
    for i, block in enumerate(config.stack):
        layer, path = f"model.layers.{i}.", f"blocks/{i}/"
        table += [
            same(f"{layer}input_layernorm.weight", f"{path}mixer_norm/scale"),
            same(f"{layer}post_attention_layernorm.weight", f"{path}mlp_norm/scale"),
        ]
        if isinstance(block.mixer, MixerConfig):
            table += _delta_rows(block.mixer, f"{layer}self_attn.", f"{path}mixer/")
        elif isinstance(block.mixer, LatentAttentionConfig):
            table += _latent_rows(block.mixer, f"{layer}self_attn.", f"{path}mixer/")
        # Released files name the dense MLP `mlp`, and those of Transformers name it as the experts.
        sparse, dense = f"{layer}block_sparse_moe.", f"{layer}mlp."
        if isinstance(block.mlp, MLPConfig):
            found = any(key.startswith(sparse) for key in keys)
            table += swiglu(sparse if found else dense, f"{path}mlp/", block.mlp.hidden)
        else:
            found = any(key.startswith(dense) for key in keys)
            table += _mixture_rows(block.mlp, dense if found else sparse, f"{path}mlp/", keys, config.width)
    return table


def _delta_rows(mixer: MixerConfig, keys: str, path: str) -> list[Row]:
    return [
        *apart(mixer, keys, path),
        linear(f"{keys}f_a_proj.weight", f"{path}decay/down/kernel"),
        linear(f"{keys}f_b_proj.weight", f"{path}decay/project/kernel"),
        same(f"{keys}A_log", f"{path}decay/log_rate", shape=(1, 1, mixer.heads, 1)),
        same(f"{keys}dt_bias", f"{path}decay/bias"),
        linear(f"{keys}b_proj.weight", f"{path}beta/kernel"),
        linear(f"{keys}g_a_proj.weight", f"{path}gate/down/kernel"),
        linear(f"{keys}g_b_proj.weight", f"{path}gate/project/kernel"),
        same(f"{keys}o_norm.weight", f"{path}norm/scale"),
        linear(f"{keys}o_proj.weight", f"{path}output/kernel"),
    ]


def _latent_rows(mixer: LatentAttentionConfig, keys: str, path: str) -> list[Row]:
    query = [linear(f"{keys}q_proj.weight", f"{path}query/kernel")]
    if mixer.query_rank is not None:
        query = [
            linear(f"{keys}q_a_proj.weight", f"{path}query_down/kernel"),
            same(f"{keys}q_a_layernorm.weight", f"{path}query_norm/scale"),
            linear(f"{keys}q_b_proj.weight", f"{path}query/kernel"),
        ]
    return [
        *query,
        linear(f"{keys}kv_a_proj_with_mqa.weight", f"{path}down/kernel"),
        same(f"{keys}kv_a_layernorm.weight", f"{path}norm/scale"),
        linear(f"{keys}kv_b_proj.weight", f"{path}up/kernel"),
        linear(f"{keys}o_proj.weight", f"{path}output/kernel"),
    ]


def _mixture_rows(mlp: MixtureConfig, keys: str, path: str, found: Collection[str], width: int) -> list[Row]:
    shared = f"{keys}shared_experts."
    if mlp.shared_hidden:
        shared_rows = swiglu(shared, f"{path}shared/", mlp.shared_hidden)
    elif found and not any(key.startswith(shared) for key in found):
        shared_rows = []
    else:  # Transformers saves a shared expert of no hidden units
        inner = dict.fromkeys((f"{shared}gate_proj.weight", f"{shared}up_proj.weight"), (0, width))
        shared_rows = [empty({**inner, f"{shared}down_proj.weight": (width, 0)})]
    return [
        *experts(mlp, f"{keys}experts.", path, ("w1", "w3", "w2"), found),
        *shared_rows,
        linear(f"{keys}gate.weight", f"{path}router/kernel"),
        same(f"{keys}gate.e_score_correction_bias", f"{path}router_bias"),
    ]


def express(config: ModelConfig) -> dict[str, Any]:
    """Return config.json of a model."""
    delta, latent = mixers_of(config, LatentAttentionConfig)
    dense = [block.mlp for block in config.stack if isinstance(block.mlp, MLPConfig)]
    sparse = [block.mlp for block in config.stack if isinstance(block.mlp, MixtureConfig)]
    mixture = sparse[0] if sparse else MixtureConfig(2, 1, 16, shared_hidden=16)
    kinds = ["dense" if isinstance(block.mlp, MLPConfig) else "sparse" for block in config.stack]
    return {
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        **NO_TOKENS,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": dense[0].hidden if dense else 4 * config.width,
        "num_hidden_layers": config.depth,
        "layer_types": layer_types(config),
        "mlp_layer_types": kinds,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "linear_num_heads": delta.heads,
        "linear_head_dim": delta.key_dim,
        "linear_conv_kernel_dim": delta.conv_size,
        "num_attention_heads": latent.heads,
        "num_key_value_heads": latent.heads,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.rank,
        "qk_nope_head_dim": latent.key_dim,
        "qk_rope_head_dim": latent.shared_key_dim,
        "v_head_dim": latent.value_dim,
        "num_experts": mixture.experts,
        "num_experts_per_token": mixture.active,
        "moe_intermediate_size": mixture.hidden,
        "num_shared_experts": mixture.shared_hidden // mixture.hidden,
        "moe_renormalize": mixture.renormalize,
        "num_expert_group": mixture.groups,
        "topk_group": mixture.active_groups,
        "routed_scaling_factor": mixture.scale,
    }


FAMILY = Family("kimi_linear", "Transformers", describe, rows, express=express)
