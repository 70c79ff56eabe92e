"""A model that learns Shakespeare's works well, on a workstation or a GPU.

    python train.py --config=configs/shakespeare.py --workdir=runs/shakespeare

10 million parameters and 82 million tokens, 18 times through the text. No run of it to the end has been recorded yet.
"""

from ml_collections import ConfigDict

from osdn_jax.training import default_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, steps= of the run."""
    given = parse_arg(arg, rule="osdn", seed=0, steps=5000)
    config = default_config()
    config.seed = given.seed
    config.steps = given.steps
    config.batch_size = 32
    config.sequence_length = 512
    config.model.rule = given.rule
    config.model.layers = 6
    config.model.width = 384
    config.model.heads = 6
    config.model.mlp_dim = 1024
    config.model.dropout = 0.2
    config.optimizer.learning_rate = 2e-3
    config.checkpoint.every = 500
    return config
