"""Checkpoints in the layouts of Transformers, written by the tests, and a NumPy model that reads nothing but them."""

import json
import struct

import ml_dtypes
import numpy as np

from support import oracle

TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64, "I64": np.int64}
TYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn}
NAMES = {np.dtype(dtype): name for name, dtype in TYPES.items()}


def write_safetensors(path, tensors, metadata=None):
    """Write {name: array} in the format of https://github.com/huggingface/safetensors, without the library."""
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    """Return {name: array} of a file, read without the package."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[first:last], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def read_folder(folder):
    """Return {name: array} of all files of a folder."""
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in read_safetensors(file).items()}


def write_folder(folder, config, tensors, *, shards=1):
    """Write a folder with config.json and the tensors in one file, or in several with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_safetensors(folder / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# The configurations


def config_of(family, **changes):
    """Return the config.json of a tiny model, whose sizes all differ."""
    return _BASES[family] | changes


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
_BASES = {
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


# The tensors


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


def kimi_delta_sizes(text):
    released = text.get("linear_attn_config")
    if released:
        return released["num_heads"], released["head_dim"], released["short_conv_kernel_size"]
    return text["linear_num_heads"], text["linear_head_dim"], text["linear_conv_kernel_dim"]


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


# The model in NumPy, float64


def reference(config, tensors, ids):
    """Return logits [B, T, vocabulary] by the equations of each family, from config.json and the tensors alone."""
    text = config.get("text_config", config)
    prefix = "model.language_model." if "text_config" in config else "model."
    weights = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    offset = 1.0 if text["model_type"].startswith("qwen") else 0.0
    epsilon = text["rms_norm_eps"]
    x = weights[f"{prefix}embed_tokens.weight"][ids]
    for i in range(text["num_hidden_layers"]):
        start = f"{prefix}layers.{i}."
        layer = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
        kind = kind_of_layer(text, i)
        mix, mlp = _mixer_of(text, layer, kind), _mlp_of(text, layer, is_sparse(text, i))
        norms = [layer[n] for names in _ALL_NORMS[text["model_type"], kind] for n in names if n in layer]
        first, second = (lambda x, w=w: _rms(x, w + offset, epsilon) for w in norms)
        if text["model_type"] == "olmo_hybrid" and kind == "full_attention":
            x = x + first(mix(x))
            x = x + second(mlp(x))
        else:
            x = x + mix(first(x))
            x = x + mlp(second(x))
    x = _rms(x, weights[f"{prefix}norm.weight"] + offset, epsilon)
    tied = config.get("tie_word_embeddings", text["tie_word_embeddings"]) and text["model_type"] != "kimi_linear"
    return x @ weights[f"{prefix}embed_tokens.weight" if tied else "lm_head.weight"].T


_PLAIN_NORMS = (("input_layernorm.weight",), ("post_attention_layernorm.weight",))
_ALL_NORMS = {(family, kind): _PLAIN_NORMS for family in _BASES for kind in ("linear_attention", "full_attention")}
_ALL_NORMS |= {(f"{f}_text", kind): _PLAIN_NORMS for f in _BASES for kind in ("linear_attention", "full_attention")}
_ALL_NORMS["olmo_hybrid", "linear_attention"] = (("attention_layer_norm.weight",), ("feedforward_layer_norm.weight",))
_ALL_NORMS["olmo_hybrid", "full_attention"] = (
    ("post_attention_layernorm.weight", "feedforward_layer_norm.weight"),
    ("post_feedforward_layernorm.weight",),
)


def _mixer_of(text, layer, kind):
    if text["model_type"] == "kimi_linear":
        mixer = _latent if kind == "full_attention" else _kimi_delta
        part = "self_attn."
    else:
        mixer = _attention if kind == "full_attention" else _delta
        part = "self_attn." if kind == "full_attention" else "linear_attn."
    own = {name.removeprefix(part): w for name, w in layer.items() if name.startswith(part)}
    return lambda x: mixer(text, own, x)


def _delta(text, w, x):
    batch, length, _ = x.shape
    key_heads, heads = text["linear_num_key_heads"], text["linear_num_value_heads"]
    key_dim, value_dim = text["linear_key_head_dim"], text["linear_value_head_dim"]
    keys, values, repeats = key_heads * key_dim, heads * value_dim, heads // key_heads
    factor, epsilon = 1.0, text["rms_norm_eps"]
    if text["model_type"] == "qwen3_next":
        grouped = (x @ w["in_proj_qkvz.weight"].T).reshape(batch, length, key_heads, -1)
        parts = np.split(grouped, np.cumsum([key_dim, key_dim, repeats * value_dim]), axis=-1)
        q, k, v, z = (part.reshape(batch, length, -1) for part in parts)
        b, a = np.split((x @ w["in_proj_ba.weight"].T).reshape(batch, length, key_heads, -1), 2, axis=-1)
        b, a = (part.reshape(batch, length, heads) for part in (b, a))
        taps, norm, output = w["conv1d.weight"], w["norm.weight"], w["out_proj.weight"]
    elif text["model_type"] == "olmo_hybrid":
        q, k, v, z = (x @ w[f"{name}_proj.weight"].T for name in "qkvg")
        b, a = x @ w["b_proj.weight"].T, x @ w["a_proj.weight"].T
        taps = np.concatenate([w[f"{name}_conv1d.weight"] for name in "qkv"])
        norm, output, epsilon = w["o_norm.weight"], w["o_proj.weight"], 1e-5
        factor = 2.0 if text["linear_allow_neg_eigval"] else 1.0
    else:
        q, k, v = np.split(x @ w["in_proj_qkv.weight"].T, [keys, 2 * keys], axis=-1)
        z, b, a = (x @ w[f"in_proj_{name}.weight"].T for name in "zba")
        taps, norm, output = w["conv1d.weight"], w["norm.weight"], w["out_proj.weight"]
    mixed = _convolved(np.concatenate([q, k, v], axis=-1), taps)
    q, k, v = np.split(mixed, [keys, 2 * keys], axis=-1)
    q, k = (_unit(y.reshape(batch, length, key_heads, key_dim)) for y in (q, k))
    v = v.reshape(batch, length, heads, value_dim)
    decay = -np.exp(w["A_log"]) * np.logaddexp(0, a + w["dt_bias"])
    out, _ = oracle.delta_rule(q, k, v, factor * _logistic(b), log_decay=decay)
    out = _rms(out, norm, epsilon) * _silu(z.reshape(v.shape))
    return out.reshape(batch, length, values) @ output.T


def _attention(text, w, x):
    batch, length, width = x.shape
    heads, key_heads = text["num_attention_heads"], text["num_key_value_heads"]
    olmo, epsilon = text["model_type"] == "olmo_hybrid", text["rms_norm_eps"]
    dim = width // heads if olmo else text["head_dim"]
    q, k, v = (x @ w[f"{name}_proj.weight"].T for name in "qkv")
    gate = None
    if olmo:
        q, k = _rms(q, w["q_norm.weight"], epsilon), _rms(k, w["k_norm.weight"], epsilon)
        q = q.reshape(batch, length, heads, dim)
        k = k.reshape(batch, length, key_heads, dim)
    else:
        q, gate = np.split(q.reshape(batch, length, heads, 2 * dim), 2, axis=-1)
        q = _rms(q, 1 + w["q_norm.weight"], epsilon)
        k = _rms(k.reshape(batch, length, key_heads, dim), 1 + w["k_norm.weight"], epsilon)
    v = v.reshape(batch, length, key_heads, dim)
    rope = text.get("rope_parameters") or {}
    base = rope.get("rope_theta", text.get("rope_theta", 1e4))
    share = 1.0 if olmo else rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 0.25))
    if base is not None:
        q, k = _rotated(q, base, int(share * dim)), _rotated(k, base, int(share * dim))
    k, v = (np.repeat(y, heads // key_heads, axis=2) for y in (k, v))
    out = _softmax_attention(q, k, v, dim**-0.5)
    out = out if gate is None else out * _logistic(gate)
    return out.reshape(batch, length, -1) @ w["o_proj.weight"].T


def _kimi_delta(text, w, x):
    batch, length, _ = x.shape
    heads, dim, _ = kimi_delta_sizes(text)
    shape = (batch, length, heads, dim)
    q, k, v = (_convolved(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]).reshape(shape) for n in "qkv")
    f, g = ((x @ w[f"{n}_a_proj.weight"].T @ w[f"{n}_b_proj.weight"].T) for n in "fg")
    decay = -np.exp(w["A_log"].reshape(heads, 1)) * np.logaddexp(0, f + w["dt_bias"]).reshape(shape)
    out, _ = oracle.delta_rule(_unit(q), _unit(k), v, _logistic(x @ w["b_proj.weight"].T), log_decay=decay)
    out = _rms(out, w["o_norm.weight"], text["rms_norm_eps"]) * _logistic(g).reshape(shape)
    return out.reshape(batch, length, -1) @ w["o_proj.weight"].T


def _latent(text, w, x):
    batch, length, _ = x.shape
    heads, own, shared = text["num_attention_heads"], text["qk_nope_head_dim"], text["qk_rope_head_dim"]
    rank = text["kv_lora_rank"]
    if text["q_lora_rank"] is None:
        q = x @ w["q_proj.weight"].T
    else:
        q = _rms(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], 1e-6) @ w["q_b_proj.weight"].T
    q = q.reshape(batch, length, heads, own + shared)
    latent = x @ w["kv_a_proj_with_mqa.weight"].T
    up = _rms(latent[..., :rank], w["kv_a_layernorm.weight"], 1e-6) @ w["kv_b_proj.weight"].T
    up = up.reshape(batch, length, heads, -1)
    common = np.broadcast_to(latent[:, :, None, rank:], (batch, length, heads, shared))
    k = np.concatenate([up[..., :own], common], axis=-1)
    out = _softmax_attention(q, k, up[..., own:], (own + shared) ** -0.5)
    return out.reshape(batch, length, -1) @ w["o_proj.weight"].T


def _mlp_of(text, layer, sparse):
    part = "block_sparse_moe." if any(name.startswith("block_sparse_moe.") for name in layer) else "mlp."
    w = {name.removeprefix(part): weight for name, weight in layer.items() if name.startswith(part)}
    if not sparse:
        return lambda x: _swiglu(x, w, "")
    mixture = _kimi_mixture if text["model_type"] == "kimi_linear" else _qwen_mixture
    return lambda x: np.stack([[mixture(text, w, token) for token in row] for row in x])


def _swiglu(x, w, prefix, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = (w[f"{prefix}{name}.weight"] for name in names)
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def _expert(w, i, x, names):
    if "experts.gate_up_proj" in w:
        gate, up = np.split(w["experts.gate_up_proj"][i], 2)
        return (_silu(x @ gate.T) * (x @ up.T)) @ w["experts.down_proj"][i].T
    return _swiglu(x, w, f"experts.{i}.", names)


def _qwen_mixture(text, w, x):
    scores = w["gate.weight"] @ x
    weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    chosen = np.argsort(-weights)[: text["num_experts_per_tok"]]
    total = weights[chosen].sum() if text.get("norm_topk_prob", True) else 1.0
    out = _logistic(w["shared_expert_gate.weight"] @ x) * _swiglu(x, w, "shared_expert.")
    names = ("gate_proj", "up_proj", "down_proj")
    return out + sum(weights[i] / total * _expert(w, i, x, names) for i in chosen)


def _kimi_mixture(text, w, x):
    scores = _logistic(w["gate.weight"] @ x)
    biased = scores + w["gate.e_score_correction_bias"]
    groups = biased.reshape(text["num_expert_group"], -1)
    best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: text["topk_group"]]
    allowed = np.isin(np.arange(len(scores)) // groups.shape[1], best)
    chosen = np.argsort(-np.where(allowed, biased, -np.inf))[: text["num_experts_per_token"]]
    total = scores[chosen].sum() + 1e-20 if text["moe_renormalize"] else 1.0
    factor = text["routed_scaling_factor"] / total
    mixed = sum(factor * scores[i] * _expert(w, i, x, ("w1", "w3", "w2")) for i in chosen)
    return mixed + _swiglu(x, w, "shared_experts.")


def _convolved(x, taps):
    """Return silu of the causal convolution of [B, T, C] with taps [C, 1, size]."""
    size = taps.shape[-1]
    padded = np.pad(x, ((0, 0), (size - 1, 0), (0, 0)))
    return _silu(sum(padded[:, j : j + x.shape[1]] * taps[:, 0, j] for j in range(size)))


def _rotated(x, base, rotated):
    """Rotate pairs (i, i + rotated / 2) of the first channels of [B, T, H, dim]."""
    half = rotated // 2
    angles = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:rotated]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag, x[..., rotated:]], axis=-1)


def _softmax_attention(q, k, v, scale):
    scores = np.einsum("bthd,bshd->bhts", q, k) * scale
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), v)


def _rms(x, weight, epsilon):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * weight


def _unit(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def _logistic(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _logistic(x)
