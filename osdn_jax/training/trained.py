"""A run that was trained, to draw from or to evaluate."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from osdn_jax.data import Tokenizer
from osdn_jax.nn import ModelConfig
from osdn_jax.nn.split import Parameters, split_model
from osdn_jax.training import fingerprints
from osdn_jax.training.build import build_model
from osdn_jax.training.checkpoints import load_parameters
from osdn_jax.training.data import build_tokenizer
from osdn_jax.training.workdir import CHECKPOINT_FOLDER, checked_workdir, load_config


class Trained(NamedTuple):
    """The model of a run by its newest checkpoint, and its tokenizer.

    apply: as `split_model` gives it.
    parameters: their moving average where the run has one.
    """

    config: ConfigDict
    model: ModelConfig
    apply: Callable[..., Any]
    parameters: Parameters
    tokenizer: Tokenizer
    step: int


def load_trained(workdir: str | os.PathLike[str]) -> Trained:
    """Reads a run. Changes nothing in its directory, and takes no lock: it may be training.

    Raises:
        FileNotFoundError: workdir holds no run, or no checkpoint; or there is no such tokenizer.
        CheckpointError: no checkpoint can be read.
        CheckpointMismatchError: the newest is of another model, or was trained with another tokenizer.
        ValueError, ImportError: as `build_tokenizer`.
    """
    workdir = checked_workdir(workdir)
    config = load_config(workdir)
    tokenizer = build_tokenizer(config)
    model = build_model(config)
    apply, parameters = split_model(model)
    step, parameters = load_parameters(
        workdir / CHECKPOINT_FOLDER,
        parameters,
        key="ema" if config.ema else "params",
        fingerprints={fingerprints.TOKENIZER: fingerprints.of_tokenizer(tokenizer)},
    )
    return Trained(config, model.config, apply, parameters, tokenizer, step)
