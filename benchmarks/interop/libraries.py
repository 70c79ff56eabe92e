"""Models of Transformers and flash-linear-attention on a CPU. It needs torch and transformers, not JAX.

flash-linear-attention has no code for a CPU: its Triton kernels run in Triton's interpreter, always those that go
token by token. Its attention calls FlashAttention, which needs a GPU too: `_flash_attention` below stands in for it.
"""

import importlib
import importlib.machinery
import itertools
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
import transformers

# Transformers takes flash-linear-attention's kernels for its own models where it finds them at their import: hide it.
sys.modules["fla"] = None
for family in ("kimi_linear", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next"):
    importlib.import_module(f"transformers.models.{family}.modeling_{family}")
del sys.modules["fla"]

FLA = ("delta_net", "gated_deltanet", "kda", "precond_gated_deltanet", "precond_kda")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that are here."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import fla
        import triton
    except ImportError:
        return found
    return {**found, "flash-linear-attention": fla.__version__, "triton": triton.__version__}


def _flash_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    causal: bool,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """Compute causal attention of [B, T, H, K] tensors; window_size is FlashAttention's (left, right)."""
    length, groups = queries.shape[1], queries.shape[2] // keys.shape[2]
    keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / queries.shape[-1] ** 0.5
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    hidden = distance < 0
    if window_size[0] >= 0:
        hidden = hidden | (distance > window_size[0])
    scores = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores, values)


def _flash_attention_packed(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    causal: bool,
    window_size: tuple[int, int],
    **lengths: object,
) -> torch.Tensor:
    """Compute the same of sequences one after another, [tokens, H, K], with the borders cu_seqlens_q."""
    borders = cu_seqlens_q.tolist()
    parts = [slice(start, end) for start, end in itertools.pairwise(borders)]
    outputs = [_flash_attention(queries[None, p], keys[None, p], values[None, p], causal, window_size) for p in parts]
    return torch.cat(outputs, dim=1)[0]


def register_fla() -> None:
    """Import flash-linear-attention so that its models run on a CPU and `AutoModelForCausalLM` knows them."""
    if "fla" in sys.modules:
        return
    import triton.runtime.autotuner

    # All configurations of a kernel give the same result; measuring them would need a GPU.
    triton.runtime.autotuner.Autotuner._bench = lambda self, *args, **kwargs: [0.0, 0.0, 0.0]
    attention = types.ModuleType("flash_attn")
    attention.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    attention.flash_attn_func = _flash_attention
    attention.flash_attn_varlen_func = _flash_attention_packed
    sys.modules["flash_attn"] = attention
    importlib.import_module("fla.models")  # it registers the models


def new(family: str, fields: dict[str, Any]) -> Any:
    """Build the model of a family with Transformers' or flash-linear-attention's configuration, in float32."""
    if family in FLA:
        register_fla()
    config = transformers.AutoConfig.for_model(family, **fields)
    config._attn_implementation = "eager"
    model = _class(family).from_config(config)
    return model.eval()


def load(folder: Path) -> Any:
    """Load a folder in float32, whatever the dtype of its file."""
    fields, _ = transformers.PreTrainedConfig.get_config_dict(folder)
    if fields["model_type"] in FLA:
        register_fla()
    model, report = _class(fields["model_type"]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{folder}: missing {report['missing_keys']}, misshapen {report['mismatched_keys']}")
    return model.eval()


def _class(family: str) -> Any:
    if family in ("qwen3_5", "qwen3_5_moe"):
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


@torch.no_grad()
def logits(model: Any, tokens: Any, mask: Any = None) -> Any:
    """Return the float32 logits [B, T, V] of tokens [B, T] as a NumPy array; mask is 0 on padding."""
    for layer in getattr(model.model, "layers", ()):
        if hasattr(getattr(layer, "attn", None), "mode"):  # flash-linear-attention
            layer.attn.mode = "fused_recurrent"
    inputs = {"input_ids": torch.as_tensor(tokens)}
    if mask is not None:
        inputs["attention_mask"] = torch.as_tensor(mask)
    return model(**inputs, use_cache=False).logits.float().numpy()
