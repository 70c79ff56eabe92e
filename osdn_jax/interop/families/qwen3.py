"""Qwen3-Next and Qwen3.5 of Transformers: Gated DeltaNet with gated attention, dense or with a mixture of experts.

The two differ in the projections of the delta layers, which Qwen3-Next groups by key head.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from osdn_jax.interop.families.rotary import rotary
from osdn_jax.interop.families.tables import NO_TOKENS, convolution, experts, frame, layer_types, mixers_of, swiglu
from osdn_jax.interop.family import Family
from osdn_jax.interop.mapping import Key, Row, linear, same
from osdn_jax.interop.options import MANY, Options
from osdn_jax.nn.config import AttentionConfig, BlockConfig, Mixer, MixerConfig, MixtureConfig, MLPConfig, ModelConfig

KINDS = ("linear_attention", "full_attention")
_ROUTER = ("output_router_logits", "router_aux_loss_coef")
_WRAPPED = "model.language_model."  # prefix of the text model in a checkpoint that also has vision
_WRAPPER_ENTRIES = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
)


def describe_next(config: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of a qwen3_next."""
    options = Options(config)
    layers = options.integer("num_hidden_layers", 48, most=MANY)
    hidden = options.integer("intermediate_size", 5632)
    dense: Any = MLPConfig(hidden)
    experts = options.integer("num_experts", 512, least=0, most=MANY)
    step = options.integer("decoder_sparse_step", 1)
    without = options.indices("mlp_only_layers", layers)
    sparse = _mixture(options, experts, 10, options.flag("norm_topk_prob", True))
    mlps = [sparse if sparse is not None and i not in without and (i + 1) % step == 0 else dense for i in range(layers)]
    return _model(options, mlps, vocab_size=151936, width=2048, key_heads=2, tied=None)


def describe_dense(config: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of a qwen3_5, or of the text model of one with vision."""
    options, tied = _text_options(config)
    hidden = options.integer("intermediate_size", 12288)
    layers = options.integer("num_hidden_layers", 32, most=MANY)
    options.require("num_experts", 0)
    options.without_effect("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    options.without_effect("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", *_ROUTER)
    return _model(options, [MLPConfig(hidden)] * layers, vocab_size=248320, width=4096, key_heads=4, tied=tied)


def describe_moe(config: Mapping[str, Any]) -> ModelConfig:
    """Return our configuration of a qwen3_5_moe, or of the text model of one with vision."""
    options, tied = _text_options(config)
    layers = options.integer("num_hidden_layers", 40, most=MANY)
    options.without_effect("intermediate_size")
    options.require("norm_topk_prob", True)
    options.require("decoder_sparse_step", 1)
    options.require("mlp_only_layers", [])
    sparse = _mixture(options, options.integer("num_experts", 256, most=MANY), 8, True)
    return _model(options, [sparse] * layers, vocab_size=248320, width=2048, key_heads=2, tied=tied)


def _text_options(config: Mapping[str, Any]) -> tuple[Options, bool | None]:
    """Return the options of the text model, and whether the embeddings are tied if the wrapper says so."""
    options = Options(config)
    if "text_config" not in options:
        return options, None
    options.without_effect(*_WRAPPER_ENTRIES)
    tied = options.flag("tie_word_embeddings", False) if "tie_word_embeddings" in options else None
    return options.section("text_config"), tied


def _mixture(options: Options, experts: int, active: int, renormalize: bool) -> MixtureConfig | None:
    """Return the mixture of experts; None without experts."""
    active = options.integer("num_experts_per_tok", active)
    hidden = options.integer("moe_intermediate_size", 512)
    shared = options.integer("shared_expert_intermediate_size", 512)
    options.without_effect(*_ROUTER)
    if not experts:
        return None
    if active > experts:
        options.problem("num_experts_per_tok", active, f"at most num_experts, {experts}")
        active = experts
    return MixtureConfig(experts, active, hidden, renormalize=renormalize, shared_hidden=shared, shared_gate=True)


def _model(
    options: Options, mlps: Sequence[Any], *, vocab_size: int, width: int, key_heads: int, tied: bool | None
) -> ModelConfig:
    """Return the configuration of a stack with these MLPs, given the defaults of its sizes."""
    width = options.integer("hidden_size", width)
    epsilon = options.number("rms_norm_eps", 1e-6)
    tied = options.flag("tie_word_embeddings", False) if tied is None else tied
    options.without_effect("tie_word_embeddings", "max_position_embeddings", "max_window_layers", "sliding_window")
    # The layers that predict further tokens (mtp) are not loaded.
    options.without_effect("mamba_ssm_dtype", *(name for name in options.config if name.startswith("mtp_")))
    options.require("hidden_act", "silu")
    options.require("attention_bias", False)
    options.require("attn_output_gate", True)
    options.require("output_gate_type", "swish", "silu")
    options.require("use_sliding_window", False)
    delta = _delta(options, width, epsilon)
    attention = _attention(options, width, epsilon, key_heads)
    vocab_size = options.integer("vocab_size", vocab_size)
    kinds = layer_kinds(options, len(mlps))
    options.finish()
    mixers: dict[str, Mixer] = {"linear_attention": delta, "full_attention": attention}
    blocks = tuple(BlockConfig(mixers[kind], mlp) for kind, mlp in zip(kinds, mlps, strict=True))
    return ModelConfig(vocab_size, blocks=blocks, tied_embeddings=tied, norm_epsilon=epsilon, norm_offset=1.0)


def layer_kinds(options: Options, layers: int) -> list[str]:
    """Return the kind of each layer, by `layer_types` or else every `full_attention_interval`-th with attention."""
    interval = options.integer("full_attention_interval", 4)
    kinds = options.words("layer_types", layers, KINDS)
    return kinds or [KINDS[1] if (i + 1) % interval == 0 else KINDS[0] for i in range(layers)]


def _delta(options: Options, width: int, epsilon: float) -> MixerConfig:
    key_heads = options.integer("linear_num_key_heads", 16)
    heads = options.integer("linear_num_value_heads", 32)
    options.divisor("linear_num_key_heads", key_heads, "linear_num_value_heads", heads)
    return MixerConfig(
        width,
        heads=heads,
        key_dim=options.integer("linear_key_head_dim", 128),
        value_dim=options.integer("linear_value_head_dim", 128),
        key_heads=key_heads if heads % key_heads == 0 else heads,
        decay="scalar",
        output_gate=True,
        conv_size=options.integer("linear_conv_kernel_dim", 4),
        norm_epsilon=epsilon,
    )


def _attention(options: Options, width: int, epsilon: float, key_heads: int) -> AttentionConfig:
    heads = options.integer("num_attention_heads", 16)
    key_heads = options.integer("num_key_value_heads", key_heads)
    options.divisor("num_key_value_heads", key_heads, "num_attention_heads", heads)
    head_dim = options.integer("head_dim", 256)
    base, rotated = rotary(options, head_dim, 0.25, "mrope_section", "mrope_interleaved")
    if base is None and not options.problems:
        options.problem("rope_theta", None, "a base of the rotary positions")
    return AttentionConfig(
        width,
        heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        key_heads=key_heads if heads % key_heads == 0 else heads,
        rotary_base=base,
        rotary_dim=rotated,
        qk_norm=True,
        qk_norm_offset=1.0,
        output_gate=True,
        norm_epsilon=epsilon,
    )


def rows(config: ModelConfig, source: Mapping[str, Any], keys: Collection[str], *, by_key_head: bool) -> list[Row]:
    """Return the rows of a model; `by_key_head` for the projections of Qwen3-Next."""
    prefix = _WRAPPED if any(key.startswith(_WRAPPED) for key in keys) else "model."
    table = frame(config, f"{prefix}embed_tokens.weight", f"{prefix}norm.weight")
    for i, block in enumerate(config.stack):
        layer, path = f"{prefix}layers.{i}.", f"blocks/{i}/"
        table += [
            same(f"{layer}input_layernorm.weight", f"{path}mixer_norm/scale"),
            same(f"{layer}post_attention_layernorm.weight", f"{path}mlp_norm/scale"),
        ]
        if isinstance(block.mixer, MixerConfig):
            project = _grouped_projections if by_key_head else _plain_projections
            table += project(block.mixer, f"{layer}linear_attn.", f"{path}mixer/")
            table += _delta_rest(f"{layer}linear_attn.", f"{path}mixer/")
        elif isinstance(block.mixer, AttentionConfig):
            table += _attention_rows(block.mixer, f"{layer}self_attn.", f"{path}mixer/")
        if isinstance(block.mlp, MLPConfig):
            table += swiglu(f"{layer}mlp.", f"{path}mlp/", block.mlp.hidden)
        else:
            table += _mixture_rows(block.mlp, f"{layer}mlp.", f"{path}mlp/", keys)
    return table


def _grouped_projections(mixer: MixerConfig, keys: str, path: str) -> list[Row]:
    """Return the rows of projections that are grouped by key head: q, k, v, z and b, a of one key head together."""
    groups = mixer.num_key_heads
    repeats = mixer.heads // groups
    values = repeats * mixer.value_dim
    qkvz = {"q": mixer.key_dim, "k": mixer.key_dim, "v": values, "z": values}
    return [
        Row(
            (Key(f"{keys}in_proj_qkvz.weight", qkvz, groups),),
            {f"{path}project/kernel": ("q", "k", "v"), f"{path}gate/kernel": ("z",)},
        ),
        Row(
            (Key(f"{keys}in_proj_ba.weight", {"b": repeats, "a": repeats}, groups),),
            {f"{path}beta/kernel": ("b",), f"{path}decay/project/kernel": ("a",)},
        ),
    ]


def _plain_projections(mixer: MixerConfig, keys: str, path: str) -> list[Row]:
    return [
        linear(f"{keys}in_proj_qkv.weight", f"{path}project/kernel"),
        linear(f"{keys}in_proj_z.weight", f"{path}gate/kernel"),
        linear(f"{keys}in_proj_b.weight", f"{path}beta/kernel"),
        linear(f"{keys}in_proj_a.weight", f"{path}decay/project/kernel"),
    ]


def _delta_rest(keys: str, path: str) -> list[Row]:
    return [
        convolution(f"{keys}conv1d.weight", f"{path}convolution/kernel"),
        same(f"{keys}A_log", f"{path}decay/log_rate"),
        same(f"{keys}dt_bias", f"{path}decay/bias"),
        same(f"{keys}norm.weight", f"{path}norm/scale"),
        linear(f"{keys}out_proj.weight", f"{path}output/kernel"),
    ]


def _attention_rows(mixer: AttentionConfig, keys: str, path: str) -> list[Row]:
    """Return the rows of attention, whose q_proj has query and output gate of each head together."""
    shared = mixer.num_key_heads * mixer.key_dim
    projections = (
        Key(f"{keys}q_proj.weight", {"q": mixer.key_dim, "gate": mixer.value_dim}, mixer.heads),
        Key(f"{keys}k_proj.weight", {"k": shared}),
        Key(f"{keys}v_proj.weight", {"v": mixer.num_key_heads * mixer.value_dim}),
    )
    return [
        Row(projections, {f"{path}project/kernel": ("q", "k", "v"), f"{path}gate/kernel": ("gate",)}),
        same(f"{keys}q_norm.weight", f"{path}query_norm/scale"),
        same(f"{keys}k_norm.weight", f"{path}key_norm/scale"),
        linear(f"{keys}o_proj.weight", f"{path}output/kernel"),
    ]


def _mixture_rows(mlp: MixtureConfig, keys: str, path: str, found: Collection[str]) -> list[Row]:
    table = experts(mlp, f"{keys}experts.", path, ("gate_proj", "up_proj", "down_proj"), found)
    table += swiglu(f"{keys}shared_expert.", f"{path}shared/", mlp.shared_hidden)
    return [
        *table,
        linear(f"{keys}gate.weight", f"{path}router/kernel"),
        linear(f"{keys}shared_expert_gate.weight", f"{path}shared_gate/kernel"),
    ]


def express(config: ModelConfig, *, kind: str) -> dict[str, Any]:
    """Return config.json of a model of a kind: "qwen3_next", "qwen3_5_text" or "qwen3_5_moe_text"."""
    delta, attention = mixers_of(config, AttentionConfig)
    dense = [block.mlp for block in config.stack if isinstance(block.mlp, MLPConfig)]
    sparse = [block.mlp for block in config.stack if isinstance(block.mlp, MixtureConfig)]
    rotated = attention.rotary_dim or attention.key_dim
    entries: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        **NO_TOKENS,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "layer_types": layer_types(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_key_heads,
        "head_dim": attention.key_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": attention.rotary_base,
            "partial_rotary_factor": rotated / attention.key_dim,
        },
        "linear_num_key_heads": delta.num_key_heads,
        "linear_num_value_heads": delta.heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv_size,
    }
    if kind != "qwen3_5_moe_text":
        entries["intermediate_size"] = dense[0].hidden if dense else 4 * config.width
    if kind == "qwen3_next":
        entries["mlp_only_layers"] = [i for i, b in enumerate(config.stack) if isinstance(b.mlp, MLPConfig)]
        entries |= {"decoder_sparse_step": 1, "num_experts": 0}
    if sparse and kind != "qwen3_5_text":
        entries |= {
            "num_experts": sparse[0].experts,
            "num_experts_per_tok": sparse[0].active,
            "moe_intermediate_size": sparse[0].hidden,
            "shared_expert_intermediate_size": sparse[0].shared_hidden,
            "norm_topk_prob": sparse[0].renormalize,
        }
    return entries


_CLASSES = {
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
_LEFT_OUT = {r"mtp\.": "multi-token prediction", r"model\.visual\.": "vision"}

QWEN3_NEXT = Family(
    "qwen3_next",
    "Transformers",
    describe_next,
    functools.partial(rows, by_key_head=True),
    express=functools.partial(express, kind="qwen3_next"),
    left_out={r"mtp\.": "multi-token prediction"},
)
QWEN3_5 = Family(
    "qwen3_5",
    "Transformers",
    describe_dense,
    functools.partial(rows, by_key_head=False),
    express=functools.partial(express, kind="qwen3_5_text"),
    model_types=("qwen3_5", "qwen3_5_text"),
    left_out=_LEFT_OUT,
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe",
    "Transformers",
    describe_moe,
    functools.partial(rows, by_key_head=False),
    express=functools.partial(express, kind="qwen3_5_moe_text"),
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    left_out=_LEFT_OUT,
)
