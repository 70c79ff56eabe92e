"""Random tensors with the names and shapes of the files that Transformers writes."""

import numpy as np

from support.pretrained.configs import is_sparse, kimi_delta_sizes, kind_of_layer


def tensors_of(config, *, seed=0, dtype=np.float32, released=False, stacked=False):
    """Return random tensors of a configuration: {name in the file: array}.

    released: the names and widths of the published files, where Transformers saves others.
    stacked: the tensors of all experts in one, as in a running Transformers.
    """
    rng = np.random.default_rng(seed)
    text = config.get("text_config", config)
    prefix = "model.language_model." if "text_config" in config else "model."
    width, shapes = text["hidden_size"], {}
    shapes[f"{prefix}embed_tokens.weight"] = (text["vocab_size"], width)
    for i in range(text["num_hidden_layers"]):
        kind, sparse = kind_of_layer(text, i), is_sparse(text, i)
        layer = _layer_shapes(text, i, kind, sparse, released, stacked)
        shapes |= {f"{prefix}layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes[f"{prefix}norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", text["tie_word_embeddings"]):
        shapes["lm_head.weight"] = (text["vocab_size"], width)
    qwen = text["model_type"].startswith("qwen")
    return {name: _random(rng, name, shape, qwen).astype(dtype) for name, shape in shapes.items()}


def _random(rng, name, shape, offset_norms):
    values = rng.normal(size=shape)
    if not values.size:
        return values
    if name.endswith("A_log"):
        return np.abs(values)
    if len(shape) < 2:
        if name.endswith("bias"):
            return 0.5 * values
        return 0.2 * values + (0 if offset_norms and not name.endswith("linear_attn.norm.weight") else 1)
    return values * (0.5 if "conv1d" in name else 0.6 * shape[-1] ** -0.5)


def _layer_shapes(text, i, kind, sparse, released, stacked):
    family = text["model_type"]
    shapes = dict.fromkeys(_norm_names(family, kind, released), (text["hidden_size"],))
    if family == "kimi_linear":
        shapes |= _kimi_mixer_shapes(text, kind)
    elif kind == "full_attention":
        shapes |= _attention_shapes(text)
    else:
        shapes |= _delta_shapes(text, released)
    if family == "kimi_linear":
        mlp = "mlp." if released and not sparse else "block_sparse_moe."
    else:
        mlp = "mlp."
    return shapes | _mlp_shapes(text, mlp, sparse, stacked)


def _norm_names(family, kind, released):
    if family != "olmo_hybrid":
        return "input_layernorm.weight", "post_attention_layernorm.weight"
    if kind == "linear_attention":
        return "attention_layer_norm.weight", "feedforward_layer_norm.weight"
    first = "post_attention_layernorm.weight" if released else "feedforward_layer_norm.weight"
    return first, "post_feedforward_layernorm.weight"


def _delta_shapes(text, released):
    width, taps = text["hidden_size"], text["linear_conv_kernel_dim"]
    heads, value_dim = text["linear_num_value_heads"], text["linear_value_head_dim"]
    keys, values = text["linear_num_key_heads"] * text["linear_key_head_dim"], heads * value_dim
    shapes = {"A_log": (heads,), "dt_bias": (heads,)}
    if text["model_type"] == "olmo_hybrid":
        total = 2 * keys + values
        widths = (keys, keys, values) if released else [len(x) for x in np.array_split(np.arange(total), 3)]
        for name, rows, true in zip("qkv", widths, (keys, keys, values), strict=True):
            shapes |= {f"{name}_conv1d.weight": (rows, 1, taps), f"{name}_proj.weight": (true, width)}
        shapes |= {"a_proj.weight": (heads, width), "b_proj.weight": (heads, width), "g_proj.weight": (values, width)}
        shapes |= {"o_proj.weight": (width, values), "o_norm.weight": (value_dim,)}
    else:
        shapes |= {"conv1d.weight": (2 * keys + values, 1, taps), "norm.weight": (value_dim,)}
        shapes |= {"out_proj.weight": (width, values)}
        if text["model_type"] == "qwen3_next":
            shapes |= {"in_proj_qkvz.weight": (2 * keys + 2 * values, width), "in_proj_ba.weight": (2 * heads, width)}
        else:
            shapes |= {"in_proj_qkv.weight": (2 * keys + values, width), "in_proj_z.weight": (values, width)}
            shapes |= {"in_proj_b.weight": (heads, width), "in_proj_a.weight": (heads, width)}
    return {f"linear_attn.{name}": shape for name, shape in shapes.items()}


def _attention_shapes(text):
    width, heads, key_heads = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    olmo = text["model_type"] == "olmo_hybrid"
    dim = width // heads if olmo else text["head_dim"]
    shapes = {"q_proj.weight": ((1 if olmo else 2) * heads * dim, width), "o_proj.weight": (width, heads * dim)}
    shapes |= dict.fromkeys(("k_proj.weight", "v_proj.weight"), (key_heads * dim, width))
    shapes |= {"q_norm.weight": (heads * dim,), "k_norm.weight": (key_heads * dim,)} if olmo else {}
    shapes |= {} if olmo else {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _kimi_mixer_shapes(text, kind):
    width = text["hidden_size"]
    if kind == "full_attention":
        heads, own, shared = text["num_attention_heads"], text["qk_nope_head_dim"], text["qk_rope_head_dim"]
        rank, values = text["kv_lora_rank"], text["v_head_dim"]
        shapes = {"kv_a_proj_with_mqa.weight": (rank + shared, width), "kv_a_layernorm.weight": (rank,)}
        shapes |= {"kv_b_proj.weight": (heads * (own + values), rank), "o_proj.weight": (width, heads * values)}
        if text["q_lora_rank"] is None:
            shapes["q_proj.weight"] = (heads * (own + shared), width)
        else:
            low = text["q_lora_rank"]
            shapes |= {"q_a_proj.weight": (low, width), "q_a_layernorm.weight": (low,)}
            shapes["q_b_proj.weight"] = (heads * (own + shared), low)
    else:
        heads, dim, taps = kimi_delta_sizes(text)
        shapes = {"A_log": (1, 1, heads, 1), "dt_bias": (heads * dim,), "b_proj.weight": (heads, width)}
        for name in "qkv":
            shapes |= {f"{name}_proj.weight": (heads * dim, width), f"{name}_conv1d.weight": (heads * dim, 1, taps)}
        for name in "fg":
            shapes |= {f"{name}_a_proj.weight": (dim, width), f"{name}_b_proj.weight": (heads * dim, dim)}
        shapes |= {"o_norm.weight": (dim,), "o_proj.weight": (width, heads * dim)}
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _mlp_shapes(text, prefix, sparse, stacked):
    width = text["hidden_size"]

    def swiglu(hidden, names=("gate_proj", "up_proj", "down_proj")):
        shapes = ((hidden, width), (hidden, width), (width, hidden))
        return {f"{name}.weight": shape for name, shape in zip(names, shapes, strict=True)}

    if not sparse:
        return {f"{prefix}{name}": shape for name, shape in swiglu(text["intermediate_size"]).items()}
    hidden, count = text["moe_intermediate_size"], text["num_experts"]
    kimi = text["model_type"] == "kimi_linear"
    shapes = {"gate.weight": (count, width)}
    if kimi:
        shapes["gate.e_score_correction_bias"] = (count,)
        shared = swiglu(hidden * text["num_shared_experts"])
        shapes |= {f"shared_experts.{name}": shape for name, shape in shared.items()}
    else:
        shared = swiglu(text["shared_expert_intermediate_size"])
        shapes |= {f"shared_expert.{name}": shape for name, shape in shared.items()}
        shapes["shared_expert_gate.weight"] = (1, width)
    if stacked:
        shapes |= {"experts.gate_up_proj": (count, 2 * hidden, width), "experts.down_proj": (count, width, hidden)}
    else:
        names = ("w1", "w3", "w2") if kimi else ("gate_proj", "up_proj", "down_proj")
        for i in range(count):
            shapes |= {f"experts.{i}.{name}": shape for name, shape in swiglu(hidden, names).items()}
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}
