"""Write tiny random checkpoints with expected logits:  python -m benchmarks.interop.make FOLDER [NAME ...]

It runs in an environment with torch and transformers (benchmarks/interop/README.md), without JAX. Each checkpoint is a
folder with config.json and safetensors files as the other library saves them, expected.npz (input_ids [2, 70], and the
logits that the other library computes in float32 from the saved files), more.npz (sequences of 1 and 200 tokens, and a
batch padded on the left with its mask) and, for Transformers, the folder gradients.
"""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.interop import layouts, libraries
from benchmarks.interop.cases import BASE, CASES, REFUSABLE, Case

LENGTHS = (70, 55, 3)  # of the rows that are padded on the left


def _fields(case: Case) -> dict[str, Any]:
    fields = {**BASE[case.family], **case.fields}
    if case.family in ("qwen3_5", "qwen3_5_moe"):
        text = {**BASE[case.family + "_text"], "tie_word_embeddings": fields.get("tie_word_embeddings", False)}
        vision = {**fields["vision_config"], "out_hidden_size": text["hidden_size"]}
        fields |= {"text_config": text, "vision_config": vision}
    return fields


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw all parameters so that each has an effect on the logits: norms, biases and decays too."""
    generator = torch.Generator().manual_seed(seed)
    values = dict(model.named_parameters())
    values.update({name: x for name, x in model.named_buffers() if name.endswith("e_score_correction_bias")})
    for name in sorted(values):
        value = values[name]
        noise = torch.randn(value.shape, generator=generator)
        last = name.rsplit(".", 1)[-1]
        if last == "e_score_correction_bias":
            value.copy_(0.1 * noise)
        elif last in ("A_log", "A_log_atk", "log_atk_scale"):
            value.copy_(0.7 * noise)
        elif last in ("dt_bias", "dt_bias_atk"):
            value.copy_(noise - 2)
        elif "conv1d" in name:
            value.copy_(0.4 * noise)
        elif value.ndim <= 1:  # scales of norms around their 0 or 1, and biases around 0
            value.copy_(value.mean().round() + 0.2 * noise)
        elif "router" in name or name.endswith(".gate.weight"):
            value.copy_(noise / value.shape[-1] ** 0.5)
        else:
            value.copy_(0.35 * noise / value.shape[-1] ** 0.5)


def write(name: str, case: Case, folder: Path) -> None:
    """Make one checkpoint in FOLDER/name."""
    seed = int.from_bytes(name.encode(), "little") % 2**31
    torch.manual_seed(seed)
    model = libraries.new(case.family, _fields(case))
    randomise(model, seed)
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    shard = {} if case.shard is None else {"max_shard_size": case.shard}
    model.to(getattr(torch, case.dtype)).save_pretrained(path, **shard)
    if case.layout is not None:
        layouts.LAYOUTS[case.layout](path)
    model = libraries.load(path)

    rng = np.random.default_rng(seed)
    long = 100 if case.family in libraries.FLA else 200  # its kernels are slow in the interpreter
    tokens = rng.integers(0, model.get_input_embeddings().num_embeddings, (2, long))
    np.savez(path / "expected.npz", input_ids=tokens[:, :70], logits=libraries.logits(model, tokens[:, :70]))
    padded = np.zeros((len(LENGTHS), LENGTHS[0]), np.int64)
    mask = np.zeros_like(padded)
    for row, length in enumerate(LENGTHS):
        padded[row, -length:] = tokens[row % 2, :length]
        mask[row, -length:] = 1
    np.savez(
        path / "more.npz",
        input_ids_1=tokens[:, :1],
        logits_1=libraries.logits(model, tokens[:, :1]),
        input_ids_long=tokens,
        logits_long=libraries.logits(model, tokens),
        input_ids_padded=padded,
        mask_padded=mask,
        logits_padded=libraries.logits(model, padded, mask),
    )
    if case.family not in libraries.FLA:
        write_gradients(model, tokens[:, :70], path)


def write_gradients(model: Any, tokens: np.ndarray, path: Path) -> None:
    """Write the gradients of a weighted sum of the logits as a checkpoint, path/gradients, with the weights."""
    weights = np.random.default_rng(0).normal(size=(*tokens.shape, model.get_output_embeddings().out_features))
    weights = (weights / tokens.size).astype(np.float32)
    logits = model(input_ids=torch.as_tensor(tokens), use_cache=False).logits
    (logits * torch.as_tensor(weights)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # it takes part in the choice of experts only
                value.zero_()
    model.save_pretrained(path / "gradients")
    np.savez(path / "gradients" / "weights.npz", input_ids=tokens, weights=weights)


def main(arguments: list[str]) -> int:
    """Write the checkpoints named, or all."""
    folder, known = Path(arguments[0]), {**CASES, **REFUSABLE}
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in arguments[1:] or known:
        write(name, known[name], folder)
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
