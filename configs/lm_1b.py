"""Language models of 1.3B parameters, alike but for their rule: width 2048, 24 layers, 16 heads of 128, 32,000 tokens.

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
and pkda. To compare rules, give them the same. The transformer is Llama's: rotary positions of base 10,000, no biases.
The tokenizer is one of 32,000 words, such as Llama 2's.
"""

from ml_collections import ConfigDict

from osdn_jax.training import ConfigError, default_config, parse_arg

TOKENS_PER_STEP = 2**19
RECIPES = {
    "fineweb_edu": {
        "path": "hf:HuggingFaceFW/fineweb-edu",
        "context": 4096,
        "tokens": 100e9,
        "learning_rate": 4e-4,
        "warmup_steps": 1907,  # a billion tokens
        "weight_decay": 0.1,
    },
    "slimpajama": {
        "path": "hf:gmongaras/SlimPajama-627B_Reupload",
        "context": 2048,
        "tokens": 50e9,
        "learning_rate": 4e-4,
        "warmup_steps": 1024,
        "weight_decay": 0.01,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, data= (a key of RECIPES; default by rule), steps= (default by the recipe's tokens)."""
    given = parse_arg(arg, rule="osdn", seed=0, data="", steps=0)
    data = given.data or ("slimpajama" if given.rule in ("pdn", "pgdn", "pkda") else "fineweb_edu")
    if data not in RECIPES:
        raise ConfigError(f"data: got {data!r}, expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[data]
    config = default_config()
    config.seed = given.seed
    config.steps = given.steps or int(recipe["tokens"] // TOKENS_PER_STEP)
    config.batch_size = TOKENS_PER_STEP // recipe["context"]
    config.accumulate = 2  # with remat 41 GB of an H200 on 8 of them, 13 GB on 64: docs/planning.md
    config.sequence_length = recipe["context"]
    config.data.path = recipe["path"]
    config.model.rule = given.rule
    config.model.vocab_size = 32_000
    config.model.layers = 24
    config.model.width = 2048
    config.model.heads = 16
    config.model.mlp_dim = 5632
    config.model.tied_embeddings = False
    config.model.output_gate = False
    config.model.dtype = "bfloat16"
    config.model.remat = "blocks"
    config.mesh.fsdp = -1
    config.optimizer.learning_rate = recipe["learning_rate"]
    config.optimizer.warmup_steps = recipe["warmup_steps"]
    config.optimizer.weight_decay = recipe["weight_decay"]
    config.validation.every = 1000
    config.validation.windows = 256
    config.validation.batch_size = 64
    config.validation.sequence_length = recipe["context"]
    config.checkpoint.every = 1000
    return config
