"""Language models of 340M parameters that differ only in the rule: width 1024, 24 layers, 8 heads of 128.

    python train.py --config=configs/lm_340m.py:rule=osdn --config.data.tokenizer=tokenizer.json --workdir=runs/340m

The sizes are those of Preconditioned DeltaNet (arXiv 2604.21100, github.com/ntumm120/preconditioned-deltanet), whose
DeltaNet has 341.6M parameters and whose Gated DeltaNet has 341.8M: embeddings are tied, and no rule has an output gate,
which would add 25M. Their KDA has one of low rank, and 354M: gate=low_rank gives it to any rule. gate=full adds one of
full rank.

    delta_net          341,594,112
    osdn               341,815,488
    gated_delta_net    341,791,104
    os_gdn             342,012,480
    kda                347,910,336
    os_kda             348,131,712
    pdn                341,987,904
    pgdn               342,184,896
    pkda               348,304,128
    transformer        341,099,520

With gate=low_rank, as in Preconditioned DeltaNet's code: kda 354,226,368, os_kda 354,447,744, pkda 354,620,160.

15 billion tokens, 2^19 a step; AdamW with betas 0.9 and 0.95, clipped at 1, warm-up of 1,024 steps, cosine down to a
tenth. Two recipes: data=fineweb_edu, the default, has OSDN's context and learning rate (2605.13473), the warm-up of
github.com/fla-org/flame and the weight decay of Gated DeltaNet (2412.06464); data=slimpajama is Preconditioned
DeltaNet's, the default of pdn, pgdn and pkda. To compare rules, use the same recipe. The transformer is Llama's: rotary
positions of base 10,000, no biases.

The vocabulary has 32,000 entries. Use a tokenizer of that size, such as Llama 2's, or train one (docs/training.md).
"""

from typing import Any

from ml_collections import ConfigDict

from configs.shared.language_model import Recipe, language_model
from osdn_jax.training import ConfigError

RECIPES = {
    "fineweb_edu": Recipe(
        path="hf:HuggingFaceFW/fineweb-edu",
        sequence_length=4096,
        tokens=15e9,
        learning_rate=1e-3,
        warmup_steps=1024,
        weight_decay=0.1,
    ),
    "slimpajama": Recipe(
        path="hf:gmongaras/SlimPajama-627B_Reupload",
        sequence_length=2048,
        tokens=15e9,
        learning_rate=4e-4,
        warmup_steps=1024,
        weight_decay=0.01,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, data= (a key of RECIPES; default by rule), steps= (default by the recipe's tokens), gate=."""
    size: dict[str, Any] = {"width": 1024, "heads": 8, "mlp_dim": 2816, "tied_embeddings": True}
    config, given = language_model(arg, RECIPES, **size, gate="none")
    if given.gate not in ("none", "low_rank", "full"):
        raise ConfigError(f"gate: got {given.gate!r}, expected one of none, low_rank, full")
    config.model.output_gate = given.gate != "none"
    if given.gate == "low_rank":  # that of Kimi Delta Attention in flash-linear-attention
        config.model.output_gate_rank = 128
        config.model.output_gate_bias = True
        config.model.output_gate_activation = "sigmoid"
    return config
