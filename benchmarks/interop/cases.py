"""The checkpoints that benchmarks.interop.make writes: tiny ones of each family, far apart in sizes and options.

`CASES` gives, by name, the fields that differ from the family's `BASE`, and how the folder is saved. Nothing is
imported here: the programs on both sides of the comparison read this table.
"""

import dataclasses
from typing import Any

Fields = dict[str, Any]

LINEAR, FULL = "linear_attention", "full_attention"
DENSE, SPARSE = "dense", "sparse"


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint: its family, the fields of its configuration, and how it is saved."""

    family: str  # a key of BASE
    fields: Fields
    dtype: str = "float32"  # of the tensors in the file
    shard: str | None = None  # the largest file, as Transformers writes it: "30KB"
    layout: str | None = None  # a change of the saved folder, of benchmarks.interop.layouts


_QWEN3_NEXT: Fields = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": [LINEAR, FULL],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
_VISION: Fields = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
}

# The fields of each family that the cases start from; the keys are Transformers' and flash-linear-attention's types.
BASE: dict[str, Fields] = {
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": {name: value for name, value in _QWEN3_NEXT.items() if name not in _EXPERTS},
    "qwen3_5_moe_text": {name: value for name, value in _QWEN3_NEXT.items() if name != "intermediate_size"},
    "qwen3_5": {"vision_config": _VISION},  # "text_config" is that of qwen3_5_text
    "qwen3_5_moe": {"vision_config": _VISION},
    "olmo_hybrid": {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "layer_types": [LINEAR, FULL],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "kimi_linear": {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "layer_types": [LINEAR, FULL],
        "mlp_layer_types": [DENSE, SPARSE],
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
_FLA: Fields = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "head_dim": 16,
    "fuse_norm": False,
    "fuse_swiglu": False,
    "fuse_cross_entropy": False,
}
BASE["gated_deltanet"] = BASE["kda"] = BASE["precond_gated_deltanet"] = BASE["precond_kda"] = _FLA
BASE["delta_net"] = {name: value for name, value in _FLA.items() if name != "head_dim"}


def _rope(theta: float, factor: float | None = None) -> Fields:
    fields = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": fields if factor is None else {**fields, "partial_rotary_factor": factor}}


def _layers(*types: str) -> Fields:
    return {"num_hidden_layers": len(types), "layer_types": list(types)}


_WIDE: Fields = {  # nothing is a power of two
    **_layers(LINEAR, LINEAR, LINEAR, FULL, LINEAR),
    **_rope(1e6, 0.5),
    "vocab_size": 97,
    "hidden_size": 44,
    "intermediate_size": 52,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
    "rms_norm_eps": 1e-5,
}
_WIDE_EXPERTS: Fields = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
_FIRST: Fields = {  # attention first, one key head, equal heads in the delta layer
    **_layers(FULL, LINEAR, FULL),
    **_rope(500.0, 1.0),
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 3,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
    "tie_word_embeddings": True,
}
_QUADRUPLE: Fields = {"linear_num_key_heads": 2, "linear_num_value_heads": 8, "linear_value_head_dim": 4}
_ATTENTION: Fields = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "window_size": 9}

CASES: dict[str, Case] = {
    "qwen3_next_wide": Case("qwen3_next", {**_WIDE, **_WIDE_EXPERTS, "norm_topk_prob": False}),
    "qwen3_next_attention_first": Case("qwen3_next", {**_FIRST, "num_experts_per_tok": 1}),
    "qwen3_next_sparse_steps": Case(
        "qwen3_next",
        {
            **_layers(LINEAR, FULL, LINEAR, FULL, LINEAR, FULL),
            **_QUADRUPLE,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_experts_per_tok": 4,
        },
    ),
    "qwen3_next_linear_only": Case("qwen3_next", {**_layers(LINEAR, LINEAR), "num_experts": 0}),
    "qwen3_next_attention_only": Case("qwen3_next", _layers(FULL, FULL)),
    "qwen3_next_bfloat16": Case("qwen3_next", {}, dtype="bfloat16"),
    "qwen3_next_shards": Case("qwen3_next", {**_layers(LINEAR, LINEAR, FULL), **_QUADRUPLE}, shard="30KB"),
    "qwen3_next_released": Case("qwen3_next", {**_layers(LINEAR, FULL, LINEAR, FULL)}, layout="qwen3_next_released"),
    "qwen3_5_wide": Case("qwen3_5_text", _WIDE),
    "qwen3_5_attention_first": Case("qwen3_5_text", _FIRST),
    "qwen3_5_bfloat16_shards": Case("qwen3_5_text", _QUADRUPLE, dtype="bfloat16", shard="20KB"),
    "qwen3_5_multimodal": Case("qwen3_5", {}),
    "qwen3_5_multimodal_tied": Case("qwen3_5", {"tie_word_embeddings": True}, dtype="bfloat16", shard="40KB"),
    "qwen3_5_moe_wide": Case("qwen3_5_moe_text", {**_WIDE, **_WIDE_EXPERTS}),
    "qwen3_5_moe_attention_first": Case("qwen3_5_moe_text", {**_FIRST, "num_experts_per_tok": 1}),
    "qwen3_5_moe_multimodal": Case("qwen3_5_moe", {}),
    "qwen3_5_moe_released": Case("qwen3_5_moe", {}, layout="qwen3_5_moe_released"),
    "olmo_hybrid_wide": Case(
        "olmo_hybrid",
        {
            **_layers(LINEAR, LINEAR, LINEAR, FULL, LINEAR),
            **_rope(1e6),
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 52,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 3,
            "linear_allow_neg_eigval": False,
            "rms_norm_eps": 1e-5,
        },
    ),
    "olmo_hybrid_attention_first": Case(
        "olmo_hybrid",
        {
            **_layers(FULL, LINEAR, FULL),
            "num_key_value_heads": 1,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 2,
            "tie_word_embeddings": True,
        },
    ),
    "olmo_hybrid_no_positions": Case(
        "olmo_hybrid",
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "num_key_value_heads": 4, **_QUADRUPLE},
    ),
    "olmo_hybrid_no_rope_parameters": Case("olmo_hybrid", {}, layout="olmo_hybrid_no_rope_parameters"),
    "olmo_hybrid_old_fields": Case("olmo_hybrid", {}, layout="olmo_hybrid_old_fields"),
    "olmo_hybrid_bfloat16_shards": Case("olmo_hybrid", {}, dtype="bfloat16", shard="20KB"),
    "olmo_hybrid_released": Case(
        "olmo_hybrid", {**_layers(LINEAR, LINEAR, FULL), "num_key_value_heads": 4}, layout="olmo_hybrid_released"
    ),
    "kimi_linear_wide": Case(
        "kimi_linear",
        {
            **_layers(LINEAR, LINEAR, LINEAR, FULL, LINEAR),
            "mlp_layer_types": [DENSE, DENSE, SPARSE, DENSE, SPARSE],
            "vocab_size": 97,
            "hidden_size": 44,
            "intermediate_size": 52,
            "moe_intermediate_size": 20,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "kv_lora_rank": 18,
            "q_lora_rank": 14,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 7,
            "linear_num_heads": 3,
            "linear_head_dim": 12,
            "linear_conv_kernel_dim": 3,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-6,
        },
    ),
    "kimi_linear_groups": Case(
        "kimi_linear",
        {
            "mlp_layer_types": [SPARSE, SPARSE],
            "num_local_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "v_head_dim": 12,
            "routed_scaling_factor": 1.5,
        },
    ),
    "kimi_linear_one_group": Case(
        "kimi_linear", {"num_local_experts": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1}
    ),
    "kimi_linear_attention_first": Case("kimi_linear", {**_layers(FULL, LINEAR), "linear_conv_kernel_dim": 2}),
    "kimi_linear_bfloat16_shards": Case("kimi_linear", {"q_lora_rank": 12}, dtype="bfloat16", shard="20KB"),
    "kimi_linear_released": Case(
        "kimi_linear",
        {**_layers(LINEAR, LINEAR, LINEAR, FULL), "mlp_layer_types": [DENSE, SPARSE, SPARSE, SPARSE]},
        layout="kimi_linear_released",
    ),
    "delta_net_plain": Case("delta_net", {"allow_neg_eigval": True, "expand_k": 0.75, "expand_v": 1.5, "num_heads": 4}),
    "delta_net_gate": Case("delta_net", {"use_gate": True, "conv_size": 3, "tie_word_embeddings": True}),
    "delta_net_fixed_beta": Case("delta_net", {"use_beta": False, "use_short_conv": False, "intermediate_size": None}),
    "delta_net_hybrid": Case("delta_net", {"num_hidden_layers": 3, "attn": {**_ATTENTION, "window_size": None}}),
    "gated_deltanet_value_heads": Case(
        "gated_deltanet",
        {"num_hidden_layers": 3, "num_heads": 2, "num_v_heads": 6, "head_dim": 12, "expand_v": 1.5, "conv_size": 3},
    ),
    "gated_deltanet_no_gate": Case("gated_deltanet", {"use_gate": False, "allow_neg_eigval": True}),
    "gated_deltanet_sigmoid": Case(
        "gated_deltanet", {"output_gate_activation": "sigmoid", "tie_word_embeddings": True, "norm_eps": 1e-5}
    ),
    "gated_deltanet_no_conv": Case("gated_deltanet", {"use_short_conv": False, "intermediate_size": None}),
    "gated_deltanet_powlu": Case("gated_deltanet", {"hidden_act": "powlu"}),
    "gated_deltanet_hybrid": Case("gated_deltanet", {"num_hidden_layers": 3, "attn": _ATTENTION}),
    "gated_deltanet_hybrid_list": Case(
        "gated_deltanet",
        {
            "num_hidden_layers": 4,
            "attn": [
                {"layers": [0, 3], "num_heads": 4, "rope_theta": 500.0},
                {"layers": [2], "num_heads": 2, "num_kv_heads": 1, "window_size": 1},
            ],
        },
    ),
    "gated_deltanet_bfloat16_shards": Case("gated_deltanet", {}, dtype="bfloat16", shard="20KB"),
    "kda_value_heads": Case(
        "kda", {"num_hidden_layers": 3, "num_heads": 2, "num_v_heads": 6, "head_dim": 12, "expand_v": 1.5}
    ),
    "kda_bound": Case("kda", {"lower_bound": -5.0, "safe_gate": True, "conv_size": 2}),
    "kda_negative": Case("kda", {"allow_neg_eigval": True, "expand_v": 0.5, "tie_word_embeddings": True}),
    "kda_hybrid": Case("kda", {"num_hidden_layers": 3, "attn": _ATTENTION, "use_short_conv": False}),
    "precond_gated_deltanet_value_heads": Case(
        "precond_gated_deltanet",
        {"num_heads": 2, "num_v_heads": 4, "head_dim": 12, "squash_x": 2.0},
    ),
    "precond_gated_deltanet_no_gate": Case(
        "precond_gated_deltanet", {"use_gate": False, "allow_neg_eigval": True, "conv_size": 3}
    ),
    "precond_gated_deltanet_hybrid": Case("precond_gated_deltanet", {"num_hidden_layers": 3, "attn": _ATTENTION}),
    "precond_kda_value_heads": Case(
        "precond_kda", {"num_heads": 2, "num_v_heads": 6, "head_dim": 12, "expand_v": 1.5, "squash_x": 1.25}
    ),
    "precond_kda_bound": Case(
        "precond_kda", {"lower_bound": -4.0, "safe_gate": True, "allow_neg_eigval": True, "tie_word_embeddings": True}
    ),
}

# Options that another library runs and that we may refuse, if the error names the option.
REFUSABLE: dict[str, Case] = {
    "qwen3_next_bias": Case("qwen3_next", {"attention_bias": True}),
    "qwen3_next_gelu": Case("qwen3_next", {"hidden_act": "gelu"}),
    "qwen3_next_yarn": Case(
        "qwen3_next",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "olmo_hybrid_bias": Case("olmo_hybrid", {"attention_bias": True}),
    "olmo_hybrid_linear_rope": Case(
        "olmo_hybrid", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}
    ),
    "kimi_linear_bias": Case("kimi_linear", {"attention_bias": True, "q_lora_rank": 12}),
    "kimi_linear_tied": Case("kimi_linear", {"tie_word_embeddings": True}),  # Transformers ignores it
    "delta_net_relu": Case("delta_net", {"qk_activation": "relu"}),
    "delta_net_sum_norm": Case("delta_net", {"qk_activation": "elu", "qk_norm": "sum"}),
    "precond_gated_deltanet_epsilon": Case("precond_gated_deltanet", {"squash_eps": 1e-3}),
}
