"""The settings that configs/lm_340m.py and configs/lm_1b.py have in common."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from osdn_jax.training import ConfigError, default_config, parse_arg

TOKENS_PER_STEP = 2**19


class Recipe(NamedTuple):
    """A data set, and how to train on it."""

    path: str
    sequence_length: int
    tokens: float  # of the whole training
    learning_rate: float  # at the peak
    warmup_steps: int
    weight_decay: float


def language_model(
    arg: str | None,
    recipes: Mapping[str, Recipe],
    *,
    width: int,
    heads: int,
    mlp_dim: int,
    tied_embeddings: bool,
    rule: str = "osdn",
    **further: Any,
) -> tuple[ConfigDict, ConfigDict]:
    """Return the configuration of a model of 24 layers, and the arguments that were given or their defaults.

    Args:
        arg: rule=, seed=, data= (a key of recipes; default: slimpajama for pdn, pgdn and pkda, else fineweb_edu),
            steps= (default: the recipe's tokens).
        recipes: by name.
        width, heads, mlp_dim, tied_embeddings: the size of the model.
        rule: default of the argument rule.
        **further: further arguments of the configuration file, with their defaults.
    """
    given = parse_arg(arg, rule=rule, seed=0, data="", steps=0, **further)
    data = given.data or ("slimpajama" if given.rule in ("pdn", "pgdn", "pkda") else "fineweb_edu")
    if data not in recipes:
        raise ConfigError(f"data: got {data!r}, expected one of {', '.join(recipes)}")
    recipe = recipes[data]
    config = default_config()
    config.seed = given.seed
    config.steps = given.steps or int(recipe.tokens // TOKENS_PER_STEP)
    config.batch_size = TOKENS_PER_STEP // recipe.sequence_length
    config.sequence_length = recipe.sequence_length
    config.data.path = recipe.path
    config.model.rule = given.rule
    config.model.vocab_size = 32_000
    config.model.layers = 24
    config.model.width = width
    config.model.heads = heads
    config.model.mlp_dim = mlp_dim
    config.model.tied_embeddings = tied_embeddings
    config.model.output_gate = False
    config.model.dtype = "bfloat16"
    config.model.remat = "blocks"
    config.mesh.fsdp = -1
    config.optimizer.learning_rate = recipe.learning_rate
    config.optimizer.warmup_steps = recipe.warmup_steps
    config.optimizer.weight_decay = recipe.weight_decay
    config.validation.every = 1000
    config.validation.windows = 256
    config.validation.batch_size = 64
    config.validation.sequence_length = recipe.sequence_length
    config.checkpoint.every = 1000
    return config, given
