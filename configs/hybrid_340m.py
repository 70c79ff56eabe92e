"""Hybrid language models of about 360M parameters: three blocks of a delta rule, then one of softmax attention.

    python train.py --config=configs/hybrid_340m.py --config.data.tokenizer=tokenizer.json --workdir=runs/hybrid

The sizes and recipes are those of configs/lm_340m.py: width 1024, 24 blocks, 8 heads of 128. Two patterns:

- pattern=pre, the default: attention as in Qwen3-Next, in pre-norm blocks, with a quarter of each head's channels
  rotated, norms of queries and keys per head, an output gate, and 2 key heads; the delta rule has an output gate.
- pattern=olmo: OLMo Hybrid's. Attention without positions, in post-norm blocks, with norms over all heads; beta in
  (0, 2) and an output gate in the delta rule.

                     pre           olmo
    delta_net        357,200,640   360,357,120
    gated_delta_net  357,348,384   360,504,864
    kda              361,937,808   365,094,288
    os_gdn           357,514,416   360,670,896
    pgdn             357,643,728   360,800,208

experts=32 replaces the MLPs by mixtures of 32 experts of 704 hidden units, and sends each token to 4 of them; the model
then has 1,811,627,184 parameters. Over a mesh the experts are split over its axis tensor.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.lm_340m import RECIPES
from configs.shared.language_model import language_model
from osdn_jax.training import ConfigError

PATTERNS: dict[str, dict[str, Any]] = {
    "pre": {
        "output_gate": True,
        "attention_key_heads": 2,
        "attention_gate": True,
        "qk_norm": True,
        "rotary_dim": 32,
    },
    "olmo": {
        "output_gate": True,
        "negative_eigenvalues": True,
        "attention_norm": "post",
        "qk_norm": True,
        "qk_norm_over": "all",
        "positions": "none",
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, data=, steps= as in configs/lm_340m.py; pattern= (a key of PATTERNS), experts= (0: none)."""
    size: dict[str, Any] = {"width": 1024, "heads": 8, "mlp_dim": 2816, "tied_embeddings": True}
    config, given = language_model(arg, RECIPES, **size, rule="os_gdn", pattern="pre", experts=0)
    if given.pattern not in PATTERNS:
        raise ConfigError(f"pattern: got {given.pattern!r}, expected one of {', '.join(PATTERNS)}")
    config.model.attention_every = 4
    config.model.update(PATTERNS[given.pattern])
    if given.experts:
        config.model.experts = given.experts
        config.model.active_experts = 4
        config.model.expert_dim = 704  # a quarter of the MLP's: as many are active
    return config
