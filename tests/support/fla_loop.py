"""Logits of flash-linear-attention's models, and of the OSDN authors', as a loop over tokens in NumPy and float64.

Written from the libraries' layers and driven by config.json and the tensors alone; nothing of the package is used.
"""

import numpy as np

from support.fla_checkpoints import DELTA, GDN, KDA, attention_layers, decay_mode, read, sizes, uses_feedback


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def rms_norm(x, weight, epsilon):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def unit(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def logits(config, weights, ids):
    """Return the logits [T, vocabulary] of one sequence of ids [T]."""
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    epsilon, attention = read(config, "norm_eps", 1e-6), attention_layers(config)
    x = w["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = {name.removeprefix(f"model.layers.{i}."): a for name, a in w.items() if f".layers.{i}." in name}
        mixer = {name.removeprefix("attn."): a for name, a in layer.items() if name.startswith("attn.")}
        h = rms_norm(x, layer["attn_norm.weight"], epsilon)
        x = x + (softmax_attention(attention[i], mixer, h) if i in attention else delta_layer(config, mixer, h))
        h = rms_norm(x, layer["mlp_norm.weight"], epsilon)
        gate, up = (h @ layer[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (activation(config, gate) * up) @ layer["mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], epsilon)
    return x @ w["model.embeddings.weight" if config.get("tie_word_embeddings") else "lm_head.weight"].T


def activation(config, gate):
    if read(config, "hidden_act", "swish") == "swish":
        return silu(gate)
    positive = np.where(gate > 0, gate, 1.0)
    return np.where(gate > 0, positive ** (3 / (np.sqrt(positive) + 1)) * sigmoid(gate), silu(gate))


def softmax_attention(spec, w, x):
    """Causal attention with rotary positions over whole heads, and a window that includes the token itself."""
    length, width = x.shape
    heads = spec["num_heads"]
    shared, size = read(spec, "num_kv_heads", heads), width // heads
    q, k, v = (x @ w[f"{name}_proj.weight"].T + w.get(f"{name}_proj.bias", 0.0) for name in "qkv")
    q, k, v = q.reshape(length, heads, size), k.reshape(length, shared, size), v.reshape(length, shared, size)
    angles = np.arange(length)[:, None] * read(spec, "rope_theta", 10000.0) ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def rotated(y):
        a, b = y[..., : size // 2], y[..., size // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k = rotated(q), rotated(k)
    out = np.zeros((length, heads, size))
    for t in range(length):
        first = max(0, t + 1 - read(spec, "window_size", length))
        for h in range(heads):
            group = h // (heads // shared)
            scores = k[first : t + 1, group] @ q[t, h] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[first : t + 1, group] / weights.sum()
    return out.reshape(length, width) @ w["o_proj.weight"].T


def delta_layer(config, w, x):
    """Projections, the recurrence token by token, and the gated norm."""
    kind, (key_heads, heads, key_dim, value_dim) = config["model_type"], sizes(config)
    length, share = len(x), heads // key_heads
    q, k, v = (mixed(config, w, x, name) for name in "qkv")
    q, k = (unit(y.reshape(length, key_heads, key_dim)) for y in (q, k))
    v = v.reshape(length, heads, value_dim)
    beta = strength(config, w, x, heads)
    decay = log_decay(config, w, x, heads, key_dim)
    step = preconditioner(config, w, x, k, beta)
    state, out = np.zeros((heads, key_dim, value_dim)), np.zeros((length, heads, value_dim))
    for t in range(length):
        factors = next(step)  # one row per key head, or per value head
        for j in range(heads):
            key, query = k[t, j // share], q[t, j // share] / np.sqrt(key_dim)
            write_key = key * (factors[j] if len(factors) == heads else factors[j // share])
            state[j] *= np.exp(decay[t, j])[..., None]
            state[j] += np.outer(write_key, beta[t, j] * (v[t, j] - state[j].T @ key))
            out[t, j] = state[j].T @ query
    out = rms_norm(out, w["o_norm.weight"], read(config, "norm_eps", 1e-6))
    if kind in KDA:
        gate = (x @ w["g_proj.0.weight"].T) @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
        out = out * sigmoid(gate).reshape(out.shape)
    elif "g_proj.weight" in w:
        gate = (x @ w["g_proj.weight"].T).reshape(out.shape)
        out = out * (sigmoid(gate) if config.get("output_gate_activation") == "sigmoid" else silu(gate))
    return out.reshape(length, -1) @ w["o_proj.weight"].T


def mixed(config, w, x, name):
    """A projection, its short convolution, and SiLU."""
    y = x @ w[f"{name}_proj.weight"].T
    taps = w.get(f"{name}_conv1d.weight")
    if taps is not None:
        count = taps.shape[-1]
        padded = np.concatenate([np.zeros((count - 1, y.shape[1])), y])
        y = np.stack([np.sum(padded[t : t + count] * taps[:, 0].T, axis=0) for t in range(len(y))])
    return silu(y)


def strength(config, w, x, heads):
    beta = sigmoid(x @ w["b_proj.weight"].T) if "b_proj.weight" in w else np.ones((len(x), heads))
    beta = np.repeat(beta, heads // beta.shape[1], axis=1)
    return 2 * beta if config.get("allow_neg_eigval") else beta


def log_decay(config, w, x, heads, key_dim):
    """The log of the decay of the state, [T, heads, channels]; zeros without."""
    if config["model_type"] in DELTA:
        return np.zeros((len(x), heads, 1))
    rate = np.exp(w["A_log"])[:, None]
    if config["model_type"] in GDN:
        return -rate * softplus(x @ w["a_proj.weight"].T + w["dt_bias"])[..., None]
    f = ((x @ w["f_proj.0.weight"].T) @ w["f_proj.1.weight"].T + w["dt_bias"]).reshape(len(x), heads, key_dim)
    bound = config.get("lower_bound")
    return -rate * softplus(f) if bound is None else bound * sigmoid(rate * f)


def preconditioner(config, w, x, k, beta):
    """Yield the factors on the key of each token, [rows, channels]."""
    kind = config["model_type"]
    if kind.startswith("precond"):
        return gram(config, w, x, k)
    if "initial_scale" not in w:
        return (np.ones(token.shape) for token in k)
    keys = np.repeat(k, len(w["initial_scale"]) // k.shape[1], axis=1)
    if not uses_feedback(config):
        return squares(w, keys)
    if decay_mode(config) in ("ema", "ema_norm"):
        return average(config, w, keys)
    return feedback(config, w, x, keys, beta)


def gram(config, w, x, k):
    name = "a_atk_proj" if config["model_type"] in GDN else "a_proj"
    decay = -np.exp(w["A_log_atk"]) * softplus(x @ w[f"{name}.weight"].T + w["dt_bias_atk"])
    gain = sigmoid(x @ w["b_atk_proj.weight"].T)
    keys = np.repeat(k, decay.shape[1] // k.shape[1], axis=1)
    a, squash = np.zeros(keys.shape[1:]), read(config, "squash_x", 1.5)
    for t in range(len(k)):
        a = np.exp(decay[t])[:, None] * a + gain[t][:, None] * keys[t] ** 2
        r = np.log(a + 1e-6) - w["log_atk_scale"][:, None]
        yield squash ** (-r / (1 + np.abs(r)))


def squares(w, keys):
    d = w["initial_scale"].copy()
    for key in keys:
        d = d + key**2
        yield 1 / (d + 1)


def average(config, w, keys):
    e, kept = w["initial_scale"].copy(), read(config, "osgm_ema_alpha", 0.999)
    for key in keys:
        d = 1 / (e + 1e-6)
        yield d / (np.sum(d * key**2, axis=-1, keepdims=True) + 1e-6) if decay_mode(config) == "ema_norm" else d
        e = kept * e + (1 - kept) * key**2


def feedback(config, w, x, keys, beta):
    mode, d, kda = decay_mode(config), w["initial_scale"].copy(), config["model_type"] == "os_kda"
    eta = read(config, "osgm_eta", 1.0)
    low, high = read(config, "osgm_d_min", 0.0), read(config, "osgm_d_max", 1e9)
    aware = read(config, "osgm_beta_aware", True) if kda else config.get("osgm_post_gate_regret")
    bounds = ("osgm_d_min", "osgm_d_max")
    clipped = not kda or all(config.get(name, 0) is not None for name in bounds)
    if not kda and aware and mode in ("learnable", "constant"):
        clipped = all(config.get(name) is not None for name in bounds)
    for t, key in enumerate(keys):
        yield d
        u, b = key**2, beta[t][:, None] if aware else 1.0
        step = b * (1 - b * np.sum(d * u, axis=-1, keepdims=True)) * u
        if config.get("osgm_use_denominator"):
            step = step / (np.sum(u, axis=-1, keepdims=True) + 1e-5)
        kept = 1.0
        if mode == "data_dependent":
            kept = sigmoid(w["osgm_a_proj.weight"] @ x[t] + w["osgm_a_proj.bias"])[:, None]
        elif "osgm_gamma_log" in w:
            kept = sigmoid(w["osgm_gamma_log"])[:, None]
        elif mode == "constant":
            kept = read(config, "osgm_decay_gamma", 0.999)
        d = kept * d + eta * step
        d = np.clip(d, low, high) if clipped else d
