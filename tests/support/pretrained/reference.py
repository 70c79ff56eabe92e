"""The models in NumPy, in float64, from config.json and the tensors alone."""

import numpy as np

from support import oracle
from support.pretrained.configs import BASES, is_sparse, kimi_delta_sizes, kind_of_layer


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
_ALL_NORMS = {(family, kind): _PLAIN_NORMS for family in BASES for kind in ("linear_attention", "full_attention")}
_ALL_NORMS |= {(f"{f}_text", kind): _PLAIN_NORMS for f in BASES for kind in ("linear_attention", "full_attention")}
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
