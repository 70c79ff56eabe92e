"""Language models of 340M parameters, alike but for their rule: width 1024, 24 layers, 8 heads of 128, 32,000 tokens.

    python train.py --config=configs/lm_340m.py:rule=osdn --config.data.tokenizer=tokenizer.json --workdir=runs/340m

The sizes are those of Preconditioned DeltaNet (arXiv 2604.21100, github.com/ntumm120/preconditioned-deltanet), whose
DeltaNet has 341.6M parameters and whose Gated DeltaNet has 341.8M: embeddings are tied, and no rule has an output gate,
which would add 25M. KDA has one of low rank there, and 354M; --config.model.output_gate=true adds one of full rank.

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

15 billion tokens, 2^19 a step; AdamW with betas 0.9 and 0.95, clipped at 1, warm-up of 1,024 steps, cosine down to a
tenth. Two recipes: data=fineweb_edu, the default, has OSDN's context and learning rate (2605.13473), the warm-up of
github.com/fla-org/flame and the weight decay of Gated DeltaNet (2412.06464); data=slimpajama is Preconditioned
DeltaNet's, the default of pdn, pgdn and pkda. To compare rules, give them the same. The transformer is Llama's: rotary
positions of base 10,000, no biases. The tokenizer is one of 32,000 words, such as Llama 2's.
"""

from ml_collections import ConfigDict

from osdn_jax.training import ConfigError, default_config, parse_arg

TOKENS_PER_STEP = 2**19
RECIPES = {
    "fineweb_edu": {
        "path": "hf:HuggingFaceFW/fineweb-edu",
        "context": 4096,
        "tokens": 15e9,
        "learning_rate": 1e-3,
        "warmup_steps": 1024,
        "weight_decay": 0.1,
    },
    "slimpajama": {
        "path": "hf:gmongaras/SlimPajama-627B_Reupload",
        "context": 2048,
        "tokens": 15e9,
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
    config.sequence_length = recipe["context"]
    config.data.path = recipe["path"]
    config.model.rule = given.rule
    config.model.vocab_size = 32_000
    config.model.layers = 24
    config.model.width = 1024
    config.model.heads = 8
    config.model.mlp_dim = 2816
    config.model.tied_embeddings = True
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
