"""The demo, `make demo`: an Online Scaled DeltaNet and a DeltaNet of the same size on Shakespeare's works.

    python train.py --config=configs/demo.py:rule=osdn --workdir=runs/osdn

365,572 parameters, 1.84 million tokens; a minute on two CPU cores. 2.386 bits per byte on the held-out plays,
2.434 with rule=delta_net; the third digit varies by processor.
"""

from ml_collections import ConfigDict

from osdn_jax.training import default_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, steps= of the run."""
    given = parse_arg(arg, rule="osdn", seed=0, steps=900)
    config = default_config()
    config.seed = given.seed
    config.steps = given.steps
    config.batch_size = 8
    config.sequence_length = 256
    config.model.rule = given.rule
    config.model.layers = 2
    config.model.width = 128
    config.model.heads = 2
    config.model.mlp_dim = 256
    config.optimizer.learning_rate = 8e-3
    config.optimizer.warmup_steps = 50
    config.validation.windows = 32
    config.validation.every = 300
    config.checkpoint.every = 300
    return config
