"""A trained run, to sample from or to evaluate."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from osdn_jax.data import Tokenizer
from osdn_jax.nn import CausalLM, ModelConfig
from osdn_jax.nn.split import Parameters, split_model
from osdn_jax.training import fingerprints
from osdn_jax.training.build import build_model
from osdn_jax.training.checkpoints import load_parameters
from osdn_jax.training.data import build_tokenizer
from osdn_jax.training.workdir import CHECKPOINT_FOLDER, checked_workdir, load_config, with_defaults


class Trained(NamedTuple):
    """The model of a run at its newest checkpoint, and its tokenizer.

    Attributes:
        config: the configuration of the run.
        model: the configuration of the model.
        apply: the model as a function, apply(parameters, tokens, …); see `nn.split_model`.
        parameters: {path: array}; their moving average if the run has one.
        tokenizer: the run's tokenizer.
        step: the checkpoint's step.
    """

    config: ConfigDict
    model: ModelConfig
    apply: Callable[..., Any]
    parameters: Parameters
    tokenizer: Tokenizer
    step: int


def load_trained(workdir: str | os.PathLike[str]) -> Trained:
    """Load the newest checkpoint of a run. Changes nothing in its directory and takes no lock: it may be training.

    Args:
        workdir: the directory of a run of `train`.

    Returns:
        The model as a function of its parameters, the parameters, and the tokenizer. docs/training.md evaluates and
        exports a run with them.

    Raises:
        FileNotFoundError: workdir holds no run, or no checkpoint; or the tokenizer's file is missing.
        CheckpointError: no checkpoint can be read.
        CheckpointMismatchError: the newest is of another model, or was trained with another tokenizer.
        ValueError, ImportError: as `build_tokenizer`.
    """
    return open_trained(workdir).load()


class Unread(NamedTuple):
    """The model of a run, whose checkpoint is still to be read.

    Attributes:
        workdir: the directory of the run.
        config: the configuration of the run.
        model: the configuration of the model.
        apply: the model as a function of its parameters.
        shapes: {path: shape and type} of the parameters.
        tokenizer: the run's tokenizer.
        network: the model, with shapes as parameters.
    """

    workdir: Path
    config: ConfigDict
    model: ModelConfig
    apply: Callable[..., Any]
    shapes: dict[str, jax.ShapeDtypeStruct]
    tokenizer: Tokenizer
    network: CausalLM

    def load(self) -> Trained:
        """Read the parameters of the newest checkpoint. Raises as `load_trained`."""
        step, parameters = load_parameters(
            self.workdir / CHECKPOINT_FOLDER,
            self.shapes,
            key="ema" if self.config.ema else "params",
            fingerprints={fingerprints.TOKENIZER: fingerprints.of_tokenizer(self.tokenizer)},
        )
        return Trained(self.config, self.model, self.apply, parameters, self.tokenizer, step)


def open_trained(workdir: str | os.PathLike[str]) -> Unread:
    """Return the model of a run without its parameters. Raises as `load_trained`."""
    workdir = checked_workdir(workdir)
    config = with_defaults(load_config(workdir))
    tokenizer = build_tokenizer(config)
    model = nnx.eval_shape(lambda: build_model(config))
    apply, shapes = split_model(model)
    return Unread(workdir, config, model.config, apply, shapes, tokenizer, model)
