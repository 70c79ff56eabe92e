"""Folders as the authors of a model publish them, where these differ from what Transformers saves.

Each function changes a saved folder in place. It needs numpy and safetensors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Fields = dict[str, Any]
Tensors = dict[str, np.ndarray]


def _config(folder: Path) -> Fields:
    fields: Fields = json.loads((folder / "config.json").read_text())
    return fields


def _write(folder: Path, fields: Fields, tensors: Tensors) -> None:
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def qwen3_next_released(folder: Path) -> None:
    """Write positions and layer types in the fields of Transformers 4, and add a head for further tokens."""
    fields, tensors = _config(folder), load_file(folder / "model.safetensors")
    rope = fields.pop("rope_parameters")
    types = fields.pop("layer_types")
    interval = types.index("full_attention") + 1
    if types != ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(types))]:
        raise ValueError(f"layer_types: got {types}, expected attention in every n-th layer")
    fields |= {
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None,
        "full_attention_interval": interval,
        "torch_dtype": fields.pop("dtype"),
        "use_sliding_window": False,
        "transformers_version": "4.57.0",
    }
    width = fields["hidden_size"]
    tensors |= {
        "mtp.fc.weight": np.ones((width, 2 * width), np.float32),
        "mtp.layers.0.input_layernorm.weight": np.ones((width,), np.float32),
        "mtp.norm.weight": np.ones((width,), np.float32),
    }
    _write(folder, fields, tensors)


def qwen3_5_moe_released(folder: Path) -> None:
    """Stack the experts, and name the three axes of the positions of images, as the released checkpoints do."""
    fields, tensors = _config(folder), load_file(folder / "model.safetensors")
    text = fields["text_config"]
    half = int(text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"]) // 2
    text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [half - half // 3 * 2] + 2 * [half // 3]}
    text |= {
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "output_gate_type": "swish",
    }
    prefix, experts = "model.language_model.layers.", range(text["num_experts"])
    for layer in range(text["num_hidden_layers"]):
        base = f"{prefix}{layer}.mlp.experts."

        def stack(part: str, base: str = base) -> np.ndarray:
            return np.stack([tensors.pop(f"{base}{i}.{part}_proj.weight") for i in experts])

        tensors[base + "gate_up_proj"] = np.concatenate([stack("gate"), stack("up")], axis=1)
        tensors[base + "down_proj"] = stack("down")
    tensors["mtp.norm.weight"] = np.ones((text["hidden_size"],), np.float32)
    _write(folder, fields, tensors)


def olmo_hybrid_no_rope_parameters(folder: Path) -> None:
    """Write null for the positions: Transformers then rotates with its default base."""
    fields = _config(folder)
    fields["rope_parameters"] = None
    _write(folder, fields, load_file(folder / "model.safetensors"))


def olmo_hybrid_old_fields(folder: Path) -> None:
    """Write the positions in the fields of Transformers 4."""
    fields = _config(folder)
    del fields["rope_parameters"]
    _write(folder, {**fields, "rope_theta": 500.0, "rope_scaling": None}, load_file(folder / "model.safetensors"))


def olmo_hybrid_released(folder: Path) -> None:
    """Name the norms of attention layers, and divide the convolutions, as the released checkpoints do; no positions."""
    fields, tensors = _config(folder), load_file(folder / "model.safetensors")
    del fields["rope_parameters"]
    fields["rope_theta"] = None
    key = fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    for layer, kind in enumerate(fields["layer_types"]):
        prefix = f"model.layers.{layer}."
        if kind == "full_attention":
            old = prefix + "feedforward_layer_norm.weight"
            if old in tensors:
                tensors[prefix + "post_attention_layernorm.weight"] = tensors.pop(old)
            continue
        names = [f"{prefix}linear_attn.{part}_conv1d.weight" for part in "qkv"]
        whole = np.concatenate([tensors[name] for name in names])
        parts = np.split(whole, (key, 2 * key))
        tensors |= {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}
    _write(folder, fields, tensors)


def kimi_linear_released(folder: Path) -> None:
    """Write the layer types, counted from 1, into linear_attn_config, and name the dense MLP `mlp`."""
    fields, tensors = _config(folder), load_file(folder / "model.safetensors")
    types, mlps = fields.pop("layer_types"), fields.pop("mlp_layer_types")
    fields["linear_attn_config"] = {
        "full_attn_layers": [i + 1 for i, kind in enumerate(types) if kind == "full_attention"],
        "kda_layers": [i + 1 for i, kind in enumerate(types) if kind == "linear_attention"],
        "head_dim": fields.pop("linear_head_dim"),
        "num_heads": fields.pop("linear_num_heads"),
        "short_conv_kernel_size": fields.pop("linear_conv_kernel_dim"),
    }
    dense = mlps.index("sparse")
    fields |= {
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True,
        "mla_use_nope": True,
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "topk_method": "noaux_tc",
    }
    for name in [name for name in tensors if ".block_sparse_moe." in name]:
        if int(name.split(".")[2]) < dense:
            tensors[name.replace(".block_sparse_moe.", ".mlp.")] = tensors.pop(name)
    _write(folder, fields, tensors)


LAYOUTS = {
    "qwen3_next_released": qwen3_next_released,
    "qwen3_5_moe_released": qwen3_5_moe_released,
    "olmo_hybrid_no_rope_parameters": olmo_hybrid_no_rope_parameters,
    "olmo_hybrid_old_fields": olmo_hybrid_old_fields,
    "olmo_hybrid_released": olmo_hybrid_released,
    "kimi_linear_released": kimi_linear_released,
}
