"""The record of a configuration in a run's working directory."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from osdn_jax import command
from osdn_jax._files import write_atomically
from osdn_jax.training.config import ABSENT, ConfigError, default_config, flatten

CONFIG_FILE = "config.json"
CHECKPOINT_FOLDER = "checkpoints"


class WorkdirConfigError(ConfigError):
    """The working directory belongs to a run with another configuration."""


def _plain(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """Return the configuration as JSON restores it (tuples become lists), so that a saved one compares equal."""
    values = config.to_dict() if isinstance(config, ConfigDict | FrozenConfigDict) else dict(config)
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a configuration may hold only what JSON can: {error}") from error


def config_difference(a: ConfigDict, b: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Compare two configurations.

    Tuples equal lists and 1 equals 1.0, as in config.json; True is not 1.

    Returns:
        The leaves that differ, sorted: (dotted key, value in a, value in b), ABSENT for a missing value.
    """
    left, right = (flatten(ConfigDict(_plain(config))) for config in (a, b))

    def same(x: Any, y: Any) -> bool:
        return x == y and isinstance(x, bool) == isinstance(y, bool)

    pairs = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in sorted(left.keys() | right.keys())]
    return [(key, x, y) for key, x, y in pairs if not same(x, y)]


def save_config(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
    """Write `workdir/config.json`, atomically. Raises ConfigError for values that JSON cannot hold."""
    write_atomically(Path(workdir) / CONFIG_FILE, json.dumps(_plain(config), indent=2, sort_keys=True) + "\n")


def load_config(workdir: str | os.PathLike[str]) -> ConfigDict:
    """Read the configuration of a run.

    Args:
        workdir: the run's directory.

    Returns:
        The configuration that `workdir/config.json` records.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file holds no JSON object.
    """
    path = checked_workdir(workdir) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is this the working directory of a run?")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return ConfigDict(values)


def with_defaults(config: ConfigDict) -> ConfigDict:
    """Return a configuration with the default of every key that it lacks, as one that an older version wrote."""
    complete = default_config()
    given = flatten(config)
    with complete.unlocked(), complete.ignore_type():
        complete.update_from_flattened_dict(given)
    return complete


def checked_workdir(workdir: str | os.PathLike[str]) -> Path:
    """Return the path of a run's directory, with "~" expanded. Creates nothing.

    Raises ConfigError for a file and for a name that `command.local_directory` refuses.
    """
    text = os.fspath(workdir)
    try:
        path = command.local_directory(text)
    except ValueError as error:
        raise ConfigError(f"--workdir={text}: {error}") from error
    if path.exists() and not path.is_dir():
        raise WorkdirConfigError(f"--workdir={path} is a file, not a directory")
    return path


def check_workdir(
    workdir: str | os.PathLike[str], config: ConfigDict, *, may_differ: Sequence[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Make `workdir` the working directory of a run with `config`, or refuse if it belongs to another run.

    Args:
        workdir: created if missing. Files that do not belong to a run are left alone.
        config: the configuration of this run; written to config.json.
        may_differ: dotted keys, or prefixes of them, that may change when a run is resumed, such as "log_every".

    Returns:
        What changed since the run was last started, all of it under `may_differ`: [(key, old value, new value)].

    Raises:
        WorkdirConfigError: the directory holds a run with another configuration, or checkpoints without a config.json.
    """
    workdir = checked_workdir(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / CONFIG_FILE).exists():
        checkpoints = workdir / CHECKPOINT_FOLDER
        if checkpoints.is_dir() and any(entry.name.isdecimal() for entry in checkpoints.iterdir()):
            raise WorkdirConfigError(
                f"{checkpoints} holds checkpoints, but there is no {CONFIG_FILE} to say of which run; "
                "give another --workdir, or put its config.json back"
            )
        save_config(workdir, config)
        return []
    changes = config_difference(with_defaults(load_config(workdir)), with_defaults(config))
    refused = [change for change in changes if not _allowed(change[0], may_differ)]
    if refused:
        lines = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, old, new in refused)
        raise WorkdirConfigError(
            f"{workdir} holds a run with another configuration:{lines}\n"
            "Give another --workdir for a new run, or the old values to resume that one."
        )
    if changes:
        save_config(workdir, config)
    return changes


def _allowed(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
