"""Checkpoints as flash-linear-attention and the OSDN authors' fork save them: names and shapes of their tensors.

Written from those libraries' layers, not from our tables of names.
"""

import json

import numpy as np
from safetensors.numpy import save_file

GDN = ("gated_deltanet", "precond_gated_deltanet", "os_gated_deltanet")
KDA = ("kda", "precond_kda", "os_kda")
DELTA = ("delta_net", "osla_delta_net")

SIZES = {"hidden_size": 16, "vocab_size": 32, "num_hidden_layers": 1, "intermediate_size": 24, "num_heads": 2}
"""Entries of small models."""


def entries(model_type, **changes):
    """Return the config.json of a small model of two heads of 4 key channels; an entry None is written as null."""
    head = {} if model_type in DELTA else {"head_dim": 4}
    narrow = {"expand_k": 0.5} if model_type in DELTA else {}
    return {"model_type": model_type, **SIZES, **head, **narrow, **changes}


def read(config, name, default):
    """Return an entry, or the default if it is absent or null."""
    value = config.get(name)
    return default if value is None else value


def sizes(config):
    """Return (key heads, value heads, key channels, value channels)."""
    if config["model_type"] in DELTA:
        heads, width = read(config, "num_heads", 16), read(config, "hidden_size", 2048)
        wide = [round(width * read(config, name, 1.0)) // heads for name in ("expand_k", "expand_v")]
        return heads, heads, *wide
    gated = config["model_type"] in GDN
    heads = read(config, "num_heads", 6 if gated else 16)
    key_dim = read(config, "head_dim", 256 if gated else 128)
    value_dim = int(key_dim * read(config, "expand_v", 2.0 if gated else 1.0))
    return heads, read(config, "num_v_heads", heads), key_dim, value_dim


def attention_layers(config):
    """Return {layer: specification of its attention}."""
    attn = read(config, "attn", [])
    return {layer: one for one in (attn if isinstance(attn, list) else [attn]) for layer in one["layers"]}


def hidden_units(config):
    """Return the hidden units of the MLP."""
    given = config.get("intermediate_size")
    rounded = int(read(config, "hidden_size", 2048) * read(config, "hidden_ratio", 4) * 2 / 3)
    return given if given is not None else (rounded + 255) // 256 * 256


def decay_mode(config):
    """Return osgm_decay_mode, with the default of its model."""
    mode = read(config, "osgm_decay_mode", "constant" if config["model_type"] == "os_kda" else "none")
    return "learnable" if mode == "none" and config.get("osgm_decay") else mode


def uses_feedback(config):
    """Return use_osgm, with the default of its model."""
    return read(config, "use_osgm", config["model_type"] != "osla_delta_net")


def _attention_shapes(spec, width):
    heads = spec["num_heads"]
    shared = read(spec, "num_kv_heads", heads) * (width // heads)
    shapes = {"q_proj.weight": (width, width), "k_proj.weight": (shared, width), "v_proj.weight": (shared, width)}
    if spec.get("qkv_bias"):
        shapes |= {"q_proj.bias": (width,), "k_proj.bias": (shared,), "v_proj.bias": (shared,)}
    return shapes | {"o_proj.weight": (width, width)}


def _delta_shapes(config, width):
    kind, (h, hv, dk, dv) = config["model_type"], sizes(config)
    wide = {"q": h * dk, "k": h * dk, "v": hv * dv}
    shapes = {f"{x}_proj.weight": (size, width) for x, size in wide.items()} | {"o_proj.weight": (width, hv * dv)}
    if read(config, "use_short_conv", True):
        shapes |= {f"{x}_conv1d.weight": (size, 1, read(config, "conv_size", 4)) for x, size in wide.items()}
    if read(config, "use_beta", True):
        shapes["b_proj.weight"] = (h if kind == "precond_kda" else hv, width)
    shapes["o_norm.weight"] = (dv,)
    if kind in GDN:
        shapes |= {"a_proj.weight": (hv, width), "A_log": (hv,), "dt_bias": (hv,)}
    if kind in KDA:
        shapes |= {"f_proj.0.weight": (dv, width), "f_proj.1.weight": (hv * dk, dv), "A_log": (hv,)}
        shapes |= {"dt_bias": (hv * dk,), "g_proj.0.weight": (dv, width), "g_proj.1.weight": (hv * dv, dv)}
        shapes["g_proj.1.bias"] = (hv * dv,)
    elif read(config, "use_gate", kind in GDN):
        shapes["g_proj.weight"] = (hv * dv, width)
    if kind.startswith("precond"):
        p, name = (h, "a_atk_proj") if kind in GDN else (hv, "a_proj")
        shapes |= {f"{name}.weight": (p, width), "b_atk_proj.weight": (p, width)}
        shapes |= dict.fromkeys(("A_log_atk", "dt_bias_atk", "log_atk_scale"), (p,))
    return shapes | (_osdn_shapes(config, width, hv, dk) if kind.startswith("os") else {})


def _osdn_shapes(config, width, heads, key_dim):
    feedback = uses_feedback(config)
    if not feedback and config["model_type"] != "osla_delta_net":
        return {}
    shapes, mode = {"initial_scale": (heads, key_dim)}, decay_mode(config) if feedback else "none"
    if mode == "data_dependent":
        shapes |= {"osgm_a_proj.weight": (heads, width), "osgm_a_proj.bias": (heads,)}
    elif mode == "learnable" or (mode == "constant" and config["model_type"] != "os_kda"):
        shapes["osgm_gamma_log"] = (heads,)
    return shapes


def shapes(config):
    """Return {name: shape} of the tensors of a checkpoint."""
    width, vocabulary = read(config, "hidden_size", 2048), read(config, "vocab_size", 32000)
    hidden, attention = hidden_units(config), attention_layers(config)
    found = {"model.embeddings.weight": (vocabulary, width), "model.norm.weight": (width,)}
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = (vocabulary, width)
    for i in range(config["num_hidden_layers"]):
        mixer = _attention_shapes(attention[i], width) if i in attention else _delta_shapes(config, width)
        block = {f"attn.{name}": shape for name, shape in mixer.items()}
        block |= {"attn_norm.weight": (width,), "mlp_norm.weight": (width,), "mlp.down_proj.weight": (width, hidden)}
        block |= {f"mlp.{x}_proj.weight": (hidden, width) for x in ("gate", "up")}
        found |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return found


def tensors(config, seed=0):
    """Return random tensors in float32, of sizes at which no norm divides by little."""
    rng = np.random.default_rng(seed)

    def values(name, shape):
        if name.endswith(("norm.weight", "initial_scale")):
            return rng.uniform(0.5, 1.5, size=shape)
        if name.endswith(("gamma_log", "osgm_a_proj.bias")):
            return rng.uniform(1.0, 3.0, size=shape)
        if "conv1d" in name:
            return rng.normal(size=shape) / 2
        if "embeddings" in name and not config.get("tie_word_embeddings"):
            return rng.normal(size=shape)
        return rng.normal(size=shape) * (1.0 if len(shape) < 2 else shape[-1] ** -0.5)

    return {name: values(name, shape).astype(np.float32) for name, shape in shapes(config).items()}


def write(folder, config, weights):
    """Write a folder with config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
