"""A language model of a million parameters; the configuration to start from for a text of your own.

    python train.py --config=configs/shakespeare.py --workdir=runs/shakespeare

3.07 million tokens of Shakespeare's works. RESULT
"""

from ml_collections import ConfigDict

from osdn_jax.training import default_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, steps= of the run."""
    given = parse_arg(arg, rule="osdn", seed=0, steps=750)
    config = default_config()
    config.seed = given.seed
    config.steps = given.steps
    config.batch_size = 8
    config.sequence_length = 512
    config.model.rule = given.rule
    config.model.layers = 3
    config.model.width = 192
    config.model.heads = 3
    config.model.mlp_dim = 384
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 50
    return config
