"""config.json of tiny models in the layouts of Transformers, and what it says of each layer."""


def config_of(family, **changes):
    """Return the config.json of a tiny model, whose sizes all differ."""
    return BASES[family] | changes


_COMMON = {
    "vocab_size": 19,
    "hidden_size": 12,
    "intermediate_size": 10,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "transformers_version": "5.23.0",
}
_DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_ROPE = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
_EXPERTS = {
    "num_experts": 4,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 7,
    "num_experts_per_tok": 2,
}
_HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
_QWEN = _COMMON | _DELTA | _HYBRID | {"head_dim": 8}
_QWEN["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}
BASES = {
    "qwen3_next": _QWEN
    | _EXPERTS
    | {"model_type": "qwen3_next", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen3_5": _QWEN | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe": _QWEN | _EXPERTS | {"model_type": "qwen3_5_moe_text"},
    "olmo_hybrid": _COMMON
    | _DELTA
    | _HYBRID
    | _ROPE
    | {"model_type": "olmo_hybrid", "hidden_size": 16, "linear_allow_neg_eigval": True},
    "kimi_linear": {name: value for name, value in _COMMON.items() if name != "max_position_embeddings"}
    | _HYBRID
    | {
        "model_type": "kimi_linear",
        "model_max_length": 64,
        "linear_conv_kernel_dim": 3,
        "linear_head_dim": 4,
        "linear_num_heads": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "kv_lora_rank": 6,
        "q_lora_rank": None,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 6,
        "moe_renormalize": True,
        "num_expert_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
    },
}


def kind_of_layer(text, i):
    if "layer_types" in text:
        return text["layer_types"][i]
    released = text.get("linear_attn_config")
    if released:
        return "full_attention" if i + 1 in released["full_attn_layers"] else "linear_attention"
    return "linear_attention" if (i + 1) % text.get("full_attention_interval", 4) else "full_attention"


def is_sparse(text, i):
    kind = text["model_type"]
    if kind == "kimi_linear":
        layers = text.get("mlp_layer_types")
        return layers[i] == "sparse" if layers else i >= text["first_k_dense_replace"]
    if kind == "qwen3_next":
        step = text.get("decoder_sparse_step", 1)
        return text["num_experts"] > 0 and i not in text["mlp_only_layers"] and (i + 1) % step == 0
    return kind.startswith("qwen3_5_moe")


def kimi_delta_sizes(text):
    released = text.get("linear_attn_config")
    if released:
        return released["num_heads"], released["head_dim"], released["short_conv_kernel_size"]
    return text["linear_num_heads"], text["linear_head_dim"], text["linear_conv_kernel_dim"]
