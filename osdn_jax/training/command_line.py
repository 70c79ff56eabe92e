"""Configurations: the command line, and the record of a configuration in a run's working directory.

A configuration is a file `configs/<name>.py` with `get_config(arg: str | None = None) -> ConfigDict`, used as

    train.py --config=configs/demo.py:rule=delta_net,seed=3 --config.optimizer.learning_rate=1e-3 --workdir=DIR

`ml_collections.config_flags` reads that line. By itself it answers a misspelt key with a traceback and a missing file
with a config that fails on first use, so `run` checks the line first and says in one line what is wrong (exit status
2).
"""

import dataclasses
import difflib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_flags import config_path

from osdn_jax import command
from osdn_jax._files import write_atomically
from osdn_jax.command import INTERRUPTED, USAGE_ERROR
from osdn_jax.training.defaults import default_config
from osdn_jax.training.interruption import end_at_second_interrupt

CONFIG_FILE = "config.json"
CHECKPOINT_FOLDER = "checkpoints"

_PARSERS: dict[type, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
}


class ConfigError(ValueError):
    """A mistake in a configuration or on the command line; its message is meant for the user as it is."""


class WorkdirConfigError(ConfigError):
    """The working directory belongs to a run with another configuration."""


@dataclasses.dataclass(frozen=True)
class Absent:
    """The value of a key that one of two configurations does not have."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = Absent()


# Values and names


def _parse_value(text: str, kind: type) -> Any:
    """`text` as a bool, int, float or str, by the rules of absl flags. Raises ValueError."""
    if kind is str:
        return text
    try:
        return _PARSERS[kind].parse(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected {_kind_name(kind)}") from error


def _kind_name(kind: type) -> str:
    return {bool: "a bool (true or false)", int: "an int", float: "a float"}.get(kind, f"a {kind.__name__}")


def _nearest(key: str, valid: Sequence[str]) -> list[str]:
    """The valid dotted keys that look most like `key`: alike as a whole, or alike in their last part."""
    whole = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    last = [name.rpartition(".")[2] for name in valid]
    alike = difflib.get_close_matches(key.rpartition(".")[2], sorted(set(last)), n=2, cutoff=0.75)
    return list(dict.fromkeys(whole + [name for name, part in zip(valid, last, strict=True) if part in alike]))[:3]


def _did_you_mean(key: str, valid: Sequence[str]) -> str:
    near = _nearest(key, valid)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def parse_arg(arg: str | None, **defaults: bool | float | str) -> ConfigDict:
    """Reads the text after the colon of `--config=file.py:key=value,key=value`.

    Args:
      arg: "key=value,…"; None or "" gives the defaults; a bare "key" sets a bool to True.
      **defaults: each key's default, whose type says how to read its value.

    Returns:
      A ConfigDict with every key of `defaults`.

    Raises:
      ConfigError: an unknown or repeated key, or a value that does not read as the type of its default.
    """
    for key, default in defaults.items():
        if type(default) not in (bool, int, float, str):
            raise TypeError(f"the default of {key!r} must be a bool, int, float or str, not {default!r}")
    values = dict(defaults)
    seen = set()
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in defaults:
            raise ConfigError(
                f"unknown key {key!r} in {item!r}{_did_you_mean(key, list(defaults))}; valid keys: "
                + (", ".join(defaults) or "none")
            )
        if key in seen:
            raise ConfigError(f"key {key!r} is given twice in {arg!r}")
        seen.add(key)
        kind = type(defaults[key])
        if not equals and kind is not bool:
            raise ConfigError(f"key {key!r} needs a value, as in {key}={defaults[key]}")
        try:
            values[key] = _parse_value(text, kind) if equals else True
        except ValueError as error:
            raise ConfigError(f"cannot read {key}={text}: {error}; valid keys: {', '.join(defaults)}") from None
    return ConfigDict(values)


# The command line


def _config_flags(argv: Sequence[str], name: str) -> list[tuple[str, str | None, str | None]]:
    """[(dotted key, "" for --name itself; text after "=" or None; the argument that follows or None)]."""
    found: list[tuple[str, str | None, str | None]] = []
    for i, item in enumerate(argv):
        if item == "--":
            break
        flag, equals, text = item.partition("=")
        match = re.fullmatch(rf"--?(?:no)?{name}(?:\.(.+))?", flag)
        if match:
            following = argv[i + 1] if i + 1 < len(argv) else None
            found.append((match[1] or "", text if equals else None, following))
    return found


def _load(spec: str) -> ConfigDict:
    """The configuration that `--config=spec` names. Raises ConfigError."""
    path_text, colon, arg = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        beside = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = _did_you_mean(str(path), beside) or (f"; there are: {', '.join(beside)}" if beside else "")
        raise ConfigError(f"no configuration file {path_text!r}{hint}")
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise ConfigError(f"{path_text} defines no get_config")
    try:
        return get_config(*([arg] if colon else []))
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {error}") from error


def _may_be_none(key: str, value: Any) -> bool:
    """Whether a key has None for a value, or has it by default."""
    return value is None or flatten(default_config()).get(key, ABSENT) is None


def _is_none(text: str | None) -> bool:
    return text in ("None", "none")


def check_overrides(argv: Sequence[str], name: str = "config") -> None:
    """Checks `--config=…` and each `--config.key=value` of a command line before config_flags reads it.

    None is a value of the keys that have it by default.

    Args:
      argv: the arguments, flag files already expanded.
      name: the flag's name.

    Raises:
      ConfigError: no such file; a key that the configuration does not have (with the nearest ones); a value of another
        type. Whatever is not checked here (tuples, whole sub-configurations) config_flags refuses itself.
    """
    given = _config_flags(argv, name)
    spec = next((text or following for key, text, following in given if not key), None)
    if spec is None:
        return
    config = _load(spec)
    valid = list(flatten(config))
    for key, text, following in given:
        if not key:
            continue
        try:
            kind = config_path.get_type(key, config)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"--{name}.{key}: {spec} has no key {key!r}{_did_you_mean(key, valid)}") from error
        if kind is type(None):
            raise ConfigError(
                f"--{name}.{key}: its default is None, which has no type to read a value by; "
                "use config_dict.placeholder(type) in the configuration file"
            )
        value = following if text is None and kind is not bool else text
        default = config_path.get_value(key, config)
        if kind in _PARSERS and value is not None and not (_is_none(value) and _may_be_none(key, default)):
            try:
                _parse_value(value, kind)
            except ValueError as error:
                hint = " or None" if _may_be_none(key, default) else ""
                hint += "" if default is None else f", such as {default}"
                raise ConfigError(f"--{name}.{key}={value}: {error}{hint}") from error


def _without_none(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """(the arguments without `--config.key=None`, which config_flags cannot read; the keys that end up as None)."""
    given = _config_flags(argv, name)
    spec = next((text or following for key, text, following in given if not key), None)
    if spec is None or not any(key and _is_none(following if text is None else text) for key, text, following in given):
        return list(argv), []
    config = _load(spec)
    kept: list[str] = []
    last: dict[str, bool] = {}  # whether the last value given for a key is None
    items = iter(argv)
    for item in items:
        if item == "--":
            kept += [item, *items]
            break
        found = _config_flags([item], name)
        if not found or not found[0][0]:
            kept.append(item)
            continue
        key, text, _ = found[0]
        pair = [item]
        if text is None and config_path.get_type(key, config) is not bool:
            text = next(items, None)
            pair += [] if text is None else [text]
        last[key] = _is_none(text) and _may_be_none(key, config_path.get_value(key, config))
        if not last[key]:
            kept += pair
    return kept, [key for key, none in last.items() if none]


def parse_flags(
    argv: Sequence[str], name: str = "config", tell: Callable[[Exception, Sequence[str]], Exception] | None = None
) -> list[str]:
    """Reads the command line into absl's flags; ends the process with one line and status 2 on a mistake in it.

    tell: as in `run`.
    """
    try:
        given = flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)
        check_overrides(given, name)
        given, none = _without_none(given, name)
        rest = flags.FLAGS([argv[0], *given])
        if flags.FLAGS[name].value is None:
            raise ConfigError(f"give a configuration: --{name}=configs/NAME.py")
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}{_did_you_mean(rest[1], list(flags.FLAGS))}")
        for key in none:
            config_path.set_value(key, flags.FLAGS[name].value, None)
    except (ConfigError, flags.Error) as error:
        fail(error if tell is None else tell(error, argv))
    return rest


def fail(error: Exception) -> NoReturn:
    """Prints an error of the user's to stderr and exits with status 2."""
    print_error(error)
    raise SystemExit(USAGE_ERROR)


def print_error(error: Exception) -> None:
    """Prints an error of the user's to stderr."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)


def run(
    main: Callable[[list[str]], Any],
    *,
    errors: tuple[type[Exception], ...] = (ConfigError,),
    tell: Callable[[Exception, Sequence[str]], Exception] | None = None,
) -> NoReturn:
    """Runs a script with a `--config` flag by `absl.app.run`: a user's mistake ends in one clear message, status 2.

    Ctrl-C ends it with status 130 and one line; a second one at once, whatever it is doing. Output that cannot be
    written ends it as in `command.run`.

    Args:
      main: called with [program name].
      errors: exceptions out of `main` whose message is for the user; any other keeps its traceback.
      tell: called with an error and the command line before the process ends, with what it returns for the user.
    """

    def guarded(argv: list[str]) -> Any:
        try:
            return main(argv)
        except BrokenPipeError:
            raise
        except errors as error:
            return fail(error if tell is None else tell(error, argv))

    def script() -> None:
        try:
            app.run(guarded, flags_parser=lambda argv: parse_flags(argv, tell=tell))
        except KeyboardInterrupt:
            print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            if tell is not None:
                tell(error, sys.argv)
            raise

    end_at_second_interrupt()
    command.run(script)


# Comparing and recording configurations


def _plain(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """The configuration as JSON gives it back (tuples become lists), so that a saved one compares equal."""
    values = config.to_dict() if isinstance(config, ConfigDict | FrozenConfigDict) else dict(config)
    try:
        return json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a configuration may hold only what JSON can: {error}") from error


def flatten(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """{dotted key: value} of every leaf; an empty sub-configuration counts as a leaf."""

    def walk(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, ConfigDict | FrozenConfigDict):
            value = value.to_dict()
        if not isinstance(value, dict) or (prefix and not value):
            yield prefix, value
            return
        for key, inner in value.items():
            yield from walk(f"{prefix}.{key}" if prefix else str(key), inner)

    return dict(walk("", config))


def config_difference(a: ConfigDict, b: ConfigDict) -> list[tuple[str, Any, Any]]:
    """The leaves in which two configurations differ: sorted (dotted key, value in a, value in b); ABSENT for no value.

    Tuples equal lists and 1 equals 1.0, as in config.json; True is not 1.
    """
    left, right = (flatten(ConfigDict(_plain(config))) for config in (a, b))

    def same(x: Any, y: Any) -> bool:
        return x == y and isinstance(x, bool) == isinstance(y, bool)

    pairs = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in sorted(left.keys() | right.keys())]
    return [(key, x, y) for key, x, y in pairs if not same(x, y)]


def save_config(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
    """Writes `workdir/config.json`, atomically. Raises ConfigError for values that JSON cannot hold."""
    write_atomically(Path(workdir) / CONFIG_FILE, json.dumps(_plain(config), indent=2, sort_keys=True) + "\n")


def load_config(workdir: str | os.PathLike[str]) -> ConfigDict:
    """Reads `workdir/config.json`. Raises FileNotFoundError, or ConfigError if it is not a JSON object."""
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


def checked_workdir(workdir: str | os.PathLike[str]) -> Path:
    """The directory of a run, with "~" expanded. Makes nothing.

    Raises ConfigError for a file, and for a name that `command.local_directory` refuses.
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
    """Makes `workdir` the working directory of a run with `config`, or refuses where it is another run's.

    Args:
      workdir: created if need be. Files that are not a run's are left alone.
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
    changes = config_difference(load_config(workdir), config)
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
