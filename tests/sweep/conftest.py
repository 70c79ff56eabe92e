"""A tiny sweep."""

import pytest

from osdn_jax.training import default_config


@pytest.fixture
def tiny():
    """The smallest configuration with two evaluations."""
    config = default_config()
    config.data.task = "mqar:length=16,pairs=2,vocabulary=32"
    config.data.validation_examples = 12
    config.model.rule = "delta_net"
    config.model.layers, config.model.width, config.model.heads, config.model.mlp_dim = 1, 8, 1, 8
    config.batch_size, config.steps, config.validation.every, config.validation.batch_size = 4, 6, 3, 8
    config.optimizer.warmup_steps = 2
    return config
