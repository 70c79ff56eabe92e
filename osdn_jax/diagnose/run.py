"""Diagnostics of a run's newest checkpoint on windows of its held-out data."""

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from osdn_jax._versions import installed
from osdn_jax.evaluation.diagnostics import Diagnostics, check_delta_rule, diagnose_model
from osdn_jax.evaluation.hindsight import STEPS
from osdn_jax.nn import CausalLM, ModelConfig, Parameters
from osdn_jax.training import build_data
from osdn_jax.training.model_config import model_name
from osdn_jax.training.trained import open_trained

WINDOWS = 4
"""Default number of held-out windows."""


class RunDiagnostics(NamedTuple):
    """Diagnostics of a run.

    Attributes:
        found: the diagnostics of its model.
        about: what was looked at: run, rule, step, seed, sizes, versions, in a form for JSON.
    """

    found: Diagnostics
    about: dict[str, Any]


def diagnose_run(
    workdir: str | os.PathLike[str],
    *,
    windows: int = WINDOWS,
    length: int | None = None,
    bins: int = 64,
    hindsight_steps: int = STEPS,
    on_layer: Callable[[int, int], None] = lambda done, layers: None,
) -> RunDiagnostics:
    """Compute the diagnostics of the newest checkpoint of a run; its directory is only read.

    Uses the moving average of the parameters if the run has one.

    Args:
        workdir: the working directory of a run of train.py.
        windows: number of held-out windows, evenly spaced. Default: 4.
        length: tokens in a window. Default: validation.sequence_length of the run.
        bins: number of bins of positions. Default: 64.
        hindsight_steps: gradient steps of each search for the best fixed c and d; 0 for none. Default: 100.
        on_layer: called with (layers that are done, all layers), for a progress bar.

    Raises:
        FileNotFoundError: workdir holds no run, or no checkpoint, or the data are no longer there.
        CheckpointError, CheckpointMismatchError: as `load_trained`.
        ValueError: the model has no delta rule, a number is out of range, or as `build_data`.
        ImportError, ConnectionError: as `build_data`.

    Example:
        found, about = diagnose_run("runs/osdn")
        found.layers[0].writes["actual"].loss_before - found.layers[0].writes["one"].loss_before
    """
    for name, value, least in (("windows", windows, 1), ("length", length, 1), ("bins", bins, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name}: got {value!r}, expected an int of at least {least}")
    run = open_trained(workdir)
    mixer = check_delta_rule(run.model)
    config = copy.deepcopy(run.config)
    if length is not None:
        config.validation.sequence_length = length
    held_out = build_data(config).held_out
    if windows > len(held_out):
        raise ValueError(f"windows: got {windows}, expected at most {len(held_out)}, the held-out windows of the run")
    chosen = [held_out[i * len(held_out) // windows] for i in range(windows)]
    tokens, ids = (np.stack([window[name] for window in chosen]) for name in ("inputs", "segment_ids"))
    if length is not None and tokens.shape[1] != length:
        raise ValueError(f"length: got {length}, expected {tokens.shape[1]} or nothing: the run is on a task")
    # Padding has the id 0; the examples of a task, which are not padded, have no other.
    valid = (ids != 0) | np.all(ids == 0, axis=1, keepdims=True)
    trained = run.load()
    layers = run.model.depth
    found = diagnose_model(
        build_trained_model(trained.model, trained.parameters),
        tokens,
        ids,
        valid,
        bins=bins,
        hindsight_steps=hindsight_steps,
        on_layer=lambda done: on_layer(done, layers),
    )
    about = {
        "run": os.fspath(workdir),
        "rule": model_name(run.config),
        "step": trained.step,
        "seed": run.config.seed,
        "windows": windows,
        "length": tokens.shape[1],
        "valid_tokens": found.tokens,
        "layers": layers,
        "heads": mixer.heads,
        "key_heads": mixer.num_key_heads,
        "key_dim": mixer.key_dim,
        "value_dim": mixer.value_dim,
        "preconditioner": mixer.preconditioner,
        "bounds": mixer.hypergradient.bounds if mixer.preconditioner == "hypergradient" else None,
        "hindsight_steps": hindsight_steps,
        "device": jax.devices()[0].device_kind,
        "versions": installed(("osdn-jax", "jax", "jaxlib", "numpy")),
    }
    return RunDiagnostics(found, about)


def build_trained_model(config: ModelConfig, parameters: Parameters) -> CausalLM:
    """Return the module of a model with the given parameters.

    Args:
        config: of the model.
        parameters: {path: array}, as `nn.split_model` names them.

    Raises:
        KeyError: a parameter is missing.

    Example:
        >>> from osdn_jax import nn
        >>> mixer = nn.mixer_config("osdn", width=16, heads=2, key_dim=8, value_dim=8)
        >>> config = nn.ModelConfig(32, layers=1, mixer=mixer, mlp_dim=16)
        >>> _, parameters = nn.split_model(nn.CausalLM(config, rngs=nnx.Rngs(0)))
        >>> build_trained_model(config, parameters).config == config
        True
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    flat = [(path, x.replace(parameters["/".join(map(str, path))])) for path, x in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))
