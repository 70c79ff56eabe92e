"""What `make demo` trains, twice: an Online Scaled DeltaNet and a DeltaNet of the same size on Shakespeare's works."""

from ml_collections import ConfigDict

from osdn_jax.training import default_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """arg: rule=, seed=, steps= of the run."""
    given = parse_arg(arg, rule="osdn", seed=0, steps=400)
    config = default_config()
    config.seed = given.seed
    config.steps = given.steps
    config.model.rule = given.rule
    return config
