"""Language models of 1.3B parameters that differ only in the rule: width 2048, 24 layers, 16 heads of 128.

    python train.py --config=configs/lm_1b.py:rule=osdn --config.data.tokenizer=tokenizer.json --workdir=runs/1b

The sizes are those of the published DeltaNet (huggingface.co/fla-hub/delta_net-1.3B-100B, 1,365M parameters):
embeddings are not tied, and no rule has an output gate, which would add 101M (--config.model.output_gate=true).

    delta_net        1,365,677,056
    osdn             1,366,513,024
    gated_delta_net  1,366,464,256
    os_gdn           1,367,300,224
    kda              1,378,309,504
    os_kda           1,379,145,472
    pdn              1,367,251,072
    pgdn             1,368,038,272
    pkda             1,379,883,520
    transformer      1,364,297,728

2^19 tokens a step; AdamW with betas 0.9 and 0.95, clipped at 1, cosine down to a tenth. Two recipes: data=fineweb_edu,
the default, is that of Gated DeltaNet at this size (2412.06464), 100 billion tokens; data=slimpajama is that of
Preconditioned DeltaNet (2604.21100), 50 billion tokens, for its own models of 1B parameters, the default of pdn, pgdn
and pkda. To compare rules, use the same recipe. The transformer is Llama's: rotary positions of base 10,000, no biases.

The vocabulary has 32,000 entries. Use a tokenizer of that size, such as Llama 2's, or train one (docs/training.md).
"""

from ml_collections import ConfigDict

from configs.shared.language_model import Recipe, language_model

RECIPES = {
    "fineweb_edu": Recipe(
        path="hf:HuggingFaceFW/fineweb-edu",
        sequence_length=4096,
        tokens=100e9,
        learning_rate=4e-4,
        warmup_steps=1907,  # a billion tokens
        weight_decay=0.1,
    ),
    "slimpajama": Recipe(
        path="hf:gmongaras/SlimPajama-627B_Reupload",
        sequence_length=2048,
        tokens=50e9,
        learning_rate=4e-4,
        warmup_steps=1024,
        weight_decay=0.01,
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, data= (a key of RECIPES; default by rule), steps= (default by the recipe's tokens)."""
    config, _ = language_model(arg, RECIPES, width=2048, heads=16, mlp_dim=5632, tied_embeddings=False)
    config.accumulate = 2  # with remat 41 GB of an H200 on 8 of them, 13 GB on 64: docs/planning.md
    return config
