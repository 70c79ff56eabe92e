"""The starting points of a new run: the parameters of another run, or of a folder of a pretrained model."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from osdn_jax import interop
from osdn_jax.interop.loading import open_folder
from osdn_jax.interop.paths import local_folder
from osdn_jax.interop.surgery import replaced_config
from osdn_jax.nn import ModelConfig
from osdn_jax.nn.split import split_model
from osdn_jax.training import fingerprints
from osdn_jax.training.checkpoints import load_parameters
from osdn_jax.training.config import flatten
from osdn_jax.training.data import Data
from osdn_jax.training.step import TrainState
from osdn_jax.training.workdir import CHECKPOINT_FOLDER, CONFIG_FILE, load_config

OWN_TOKENIZER = "init"  # of config.data.tokenizer: that of the folder in config.init


class RunOrigin(NamedTuple):
    """Another run, whose parameters a new run starts from."""

    folder: Path  # of its checkpoints
    key: str  # of the parameters in a checkpoint
    fingerprints: dict[str, str]  # that its checkpoint must have

    @classmethod
    def of(cls, workdir: str | Path, data: Data) -> "RunOrigin":
        """Describe the run in a directory.

        Raises FileNotFoundError if there is none, or it has no checkpoints, and ValueError for a wrong path.
        """
        path = local_folder(workdir, "start_from").absolute()
        for name in (CONFIG_FILE, CHECKPOINT_FOLDER):
            if not (path / name).exists():
                raise FileNotFoundError(
                    f"start_from: got {str(workdir)!r}, expected the directory of a run; it has no {name}"
                )
        key = "ema" if load_config(path).ema else "params"
        same = {fingerprints.TOKENIZER: data.fingerprints[fingerprints.TOKENIZER]}
        return cls(path / CHECKPOINT_FOLDER, key, same)

    def start(self, state: TrainState) -> tuple[TrainState, str]:
        """Return the state with the run's parameters, and a message. Raises as `load_parameters`."""
        step, params = load_parameters(self.folder, state.params, key=self.key, fingerprints=self.fingerprints)
        return _with(state, params), f"starting from the parameters of step {step:,} in {self.folder.parent}"


class FolderOrigin(NamedTuple):
    """A folder of a pretrained model, whose parameters a new run starts from."""

    config: ConfigDict

    def start(self, state: TrainState) -> tuple[TrainState, str]:
        """Return the state with the folder's parameters in float32, where the state's are, and a message."""
        sharding = next(iter(state.params.values())).sharding
        model, changes = (
            interop.load_pretrained(
                self.config.init,
                dtype=jnp.float32,
                mesh=cast(Mesh, sharding.mesh) if isinstance(sharding, NamedSharding) else None,
                ignore_remote_code=self.config.ignore_remote_code,
            ),
            _surgery(self.config),
        )
        model = interop.replace_rule(model, **changes) if changes else model
        _, loaded = split_model(model)
        params = {name: jax.device_put(loaded[name], x.sharding) for name, x in state.params.items()}
        return _with(state, params), f"starting from the model in {self.config.init}"


Origin = RunOrigin | FolderOrigin


def origin_of(config: ConfigDict, start_from: str | Path | None, data: Data) -> Origin | None:
    """Return where the run takes its parameters from. Raises ValueError for two places, and as `RunOrigin.of`."""
    if start_from is None:
        return FolderOrigin(config) if config.init else None
    if config.init:
        raise ValueError(f"init: got {config.init!r} and start_from = {str(start_from)!r}; give one of them")
    return RunOrigin.of(start_from, data)


def with_init(config: ConfigDict, workdir: str | Path | None = None) -> ConfigDict:
    """Return the configuration with the model of config.init in model.stack; the same one without init.

    Args:
        config: with the keys of `default_config`.
        workdir: directory of the run. If the run has started, its record of the model is used, so that it can
            be resumed without the folder.

    Raises:
        ValueError: surgery without init; both model.stack and init; init is no folder of this machine; or its model is
            not supported.
        FileNotFoundError: there is no such folder.
    """
    if not config.init:
        given = [key for key, value in flatten(config.surgery).items() if value]
        if given:
            raise ValueError(
                f"surgery.{given[0]}: got {config.surgery[given[0]]!r} without init, expected a model in it"
            )
        if config.data.tokenizer == OWN_TOKENIZER:
            raise ValueError(f"data.tokenizer: got {OWN_TOKENIZER!r} without init, expected a folder in it")
        return config
    changed = copy.deepcopy(config)
    changed.init = str(local_folder(config.init, "init").absolute())
    if config.data.tokenizer == OWN_TOKENIZER:
        changed.data.tokenizer = changed.init
    recorded = _recorded(changed, workdir)
    if config.model.stack is not None and recorded is None:
        raise ValueError("model.stack: got a model in addition to init, expected one of them")
    changed.model.stack = recorded or json.dumps(dataclasses.asdict(_model_of(changed)))
    return changed


def _recorded(config: ConfigDict, workdir: str | Path | None) -> str | None:
    """Return the model.stack of a run that has started from the same folder."""
    if workdir is None or not (Path(workdir) / CONFIG_FILE).is_file():
        return None
    before = load_config(workdir)
    return before.model.get("stack") if before.get("init") == config.init else None


def _model_of(config: ConfigDict) -> ModelConfig:
    """Return the configuration of the model of config.init after its surgery."""
    made = open_folder(
        config.init,
        max_length=config.model.max_length or config.sequence_length,
        ignore_remote_code=config.ignore_remote_code,
    ).config
    changes = _surgery(config)
    return replaced_config(made, **changes) if changes else made


def _surgery(config: ConfigDict) -> dict[str, Any]:
    """Return the arguments of `interop.replace_rule`; {} for no surgery."""
    settings = config.surgery
    changes = {name: settings[name] for name in ("preconditioner", "decay") if settings[name] is not None}
    if settings.layers and not changes:
        raise ValueError(
            f"surgery.layers: got {settings.layers!r} without a change, expected surgery.preconditioner too"
        )
    if settings.layers:
        try:
            changes["layers"] = tuple(int(number) for number in settings.layers.split(","))
        except ValueError as error:
            raise ValueError(
                f"surgery.layers: got {settings.layers!r}, expected numbers of blocks such as 0,1,-1"
            ) from error
    return changes


def _with(state: TrainState, params: dict[str, jax.Array]) -> TrainState:
    """Return the state with these parameters, all of it committed to its devices.

    Loaded arrays are committed, new ones are not. A step that is given both returns committed ones alone, so the second
    step would be compiled again.
    """
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # each is donated
    commit = lambda x: x if x.committed else jax.device_put(x, x.sharding)
    return jax.tree.map(commit, state._replace(params=params, ema=ema))
