"""Training: configuration, optimiser, step, loop, checkpoints and metrics."""

from osdn_jax._optional import needs_extra

with needs_extra("train", "osdn_jax.training"):
    from osdn_jax.training.build import (
        build_model,
        build_model_config,
        build_optimizer,
        build_schedule,
        build_step_config,
    )
    from osdn_jax.training.checkpoints import CheckpointError, CheckpointMismatchError, Checkpoints, load_parameters
    from osdn_jax.training.command_line import parse_arg
    from osdn_jax.training.config import ConfigError, default_config
    from osdn_jax.training.data import Data, build_corpus, build_data, build_tokenizer
    from osdn_jax.training.interruption import Interrupted
    from osdn_jax.training.lock import WorkdirInUseError
    from osdn_jax.training.loop import DataError, DivergedError, Result, train
    from osdn_jax.training.metrics import MetricsWriter, read_metrics
    from osdn_jax.training.plots import plot_loss
    from osdn_jax.training.ranges import check_ranges
    from osdn_jax.training.step import StepConfig, TrainState, make_train_step
    from osdn_jax.training.trained import Trained, load_trained
    from osdn_jax.training.workdir import WorkdirConfigError, load_config

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "Checkpoints",
    "ConfigError",
    "Data",
    "DataError",
    "DivergedError",
    "Interrupted",
    "MetricsWriter",
    "Result",
    "StepConfig",
    "TrainState",
    "Trained",
    "WorkdirConfigError",
    "WorkdirInUseError",
    "build_corpus",
    "build_data",
    "build_model",
    "build_model_config",
    "build_optimizer",
    "build_schedule",
    "build_step_config",
    "build_tokenizer",
    "check_ranges",
    "default_config",
    "load_config",
    "load_parameters",
    "load_trained",
    "make_train_step",
    "parse_arg",
    "plot_loss",
    "read_metrics",
    "train",
]
