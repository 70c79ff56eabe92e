"""The command line of a script with a `--config` flag.

A configuration is a file `configs/<name>.py` with `get_config(arg: str | None = None) -> ConfigDict`, used as

    train.py --config=configs/demo.py:rule=delta_net,seed=3 --config.optimizer.learning_rate=1e-3 --workdir=DIR

`ml_collections.config_flags` parses that line, but answers a misspelt key with a traceback and a missing file with a
config that fails on first use. So `run` checks the line first and reports a mistake in one line, with exit status 2.
"""

import difflib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from osdn_jax import command
from osdn_jax.command import INTERRUPTED, USAGE_ERROR, program
from osdn_jax.training.config import ABSENT, ConfigError, default_config, flatten
from osdn_jax.training.interruption import end_at_second_interrupt

_PARSERS: dict[type, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
}


# Values and keys


def parse_value(text: str, kind: type) -> Any:
    """Parse a bool, int, float or str by the rules of absl flags. Raises ValueError."""
    if kind is str:
        return text
    try:
        return _PARSERS[kind].parse(text)
    except (ValueError, TypeError) as error:
        raise ValueError(f"expected {_kind_name(kind)}") from error


def _kind_name(kind: type) -> str:
    return {bool: "a bool (true or false)", int: "an int", float: "a float"}.get(kind, f"a {kind.__name__}")


def _nearest(key: str, valid: Sequence[str]) -> list[str]:
    """Return up to three valid dotted keys that resemble `key`, as a whole or in their last component."""
    whole = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    last = [name.rpartition(".")[2] for name in valid]
    similar = difflib.get_close_matches(key.rpartition(".")[2], sorted(set(last)), n=2, cutoff=0.75)
    return list(dict.fromkeys(whole + [name for name, part in zip(valid, last, strict=True) if part in similar]))[:3]


def did_you_mean(key: str, valid: Sequence[str]) -> str:
    """Return " (did you mean …?)" with the valid keys that resemble `key`; "" if none does."""
    near = _nearest(key, valid)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def parse_arg(arg: str | None, **defaults: bool | float | str) -> ConfigDict:
    """Parse the text after the colon of `--config=file.py:key=value,key=value`.

    Args:
        arg: "key=value,…"; None or "" gives the defaults; a bare "key" sets a bool to True.
        **defaults: the default of each key; its type determines how the value is parsed.

    Returns:
        A ConfigDict with every key of `defaults`.

    Raises:
        ConfigError: an unknown or repeated key, or a value that cannot be parsed as the type of its default.
        TypeError: a default that is no bool, int, float or str.

    Example:
        >>> from osdn_jax.training import parse_arg
        >>> given = parse_arg("rule=kda,seed=3", rule="osdn", seed=0, steps=900)
        >>> given.rule, given.seed, given.steps
        ('kda', 3, 900)
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
                f"unknown key {key!r} in {item!r}{did_you_mean(key, list(defaults))}; valid keys: "
                + (", ".join(defaults) or "none")
            )
        if key in seen:
            raise ConfigError(f"key {key!r} is given twice in {arg!r}")
        seen.add(key)
        kind = type(defaults[key])
        if not equals and kind is not bool:
            raise ConfigError(f"key {key!r} needs a value, as in {key}={defaults[key]}")
        try:
            values[key] = parse_value(text, kind) if equals else True
        except ValueError as error:
            raise ConfigError(f"cannot read {key}={text}: {error}; valid keys: {', '.join(defaults)}") from None
    return ConfigDict(values)


# Checks before config_flags


def _config_flags(argv: Sequence[str], name: str) -> list[tuple[str, str | None, str | None]]:
    """Find `--name` and `--name.key` in a command line.

    Returns:
        [(dotted key, "" for --name itself; text after "=" or None; the argument that follows or None)].
    """
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
    """Load the configuration of `--config=spec`. Raises ConfigError."""
    return load_with_globals(spec)[0]


def load_with_globals(spec: str) -> tuple[ConfigDict, dict[str, Any]]:
    """Return the configuration of `--config=spec` and all names that its file defines. Raises ConfigError."""
    path_text, colon, arg = spec.partition(":")
    path = Path(path_text)
    if not path.is_file():
        siblings = sorted(str(p) for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = did_you_mean(str(path), siblings) or (f"; there are: {', '.join(siblings)}" if siblings else "")
        raise ConfigError(f"no configuration file {path_text!r}{hint}")
    names = runpy.run_path(str(path))
    get_config = names.get("get_config")
    if get_config is None:
        raise ConfigError(f"{path_text} defines no get_config")
    try:
        return get_config(*([arg] if colon else [])), names
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {error}") from error


def _may_be_none(key: str, value: Any) -> bool:
    """Return True if the key's value is None, in this configuration or by default."""
    return value is None or flatten(default_config()).get(key, ABSENT) is None


def _is_none(text: str | None) -> bool:
    return text in ("None", "none")


def check_overrides(argv: Sequence[str], name: str = "config") -> None:
    """Check `--config=…` and each `--config.key=value` of a command line before config_flags parses it.

    None is accepted for keys whose default is None.

    Args:
        argv: the arguments, flag files already expanded.
        name: the flag's name.

    Raises:
        ConfigError: no such file; a key that the configuration does not have (with the nearest ones); a value of
            another type. config_flags itself refuses what is not checked here (tuples, whole sub-configurations).
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
            raise ConfigError(f"--{name}.{key}: {spec} has no key {key!r}{did_you_mean(key, valid)}") from error
        if kind is type(None):
            raise ConfigError(
                f"--{name}.{key}: its default is None, which has no type to read a value by; "
                "use config_dict.placeholder(type) in the configuration file"
            )
        value = following if text is None and kind is not bool else text
        default = config_path.get_value(key, config)
        if kind in _PARSERS and value is not None and not (_is_none(value) and _may_be_none(key, default)):
            try:
                parse_value(value, kind)
            except ValueError as error:
                hint = " or None" if _may_be_none(key, default) else ""
                hint += "" if default is None else f", such as {default}"
                raise ConfigError(f"--{name}.{key}={value}: {error}{hint}") from error


def _without_none(argv: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Take `--config.key=None`, which config_flags cannot parse, out of a command line.

    Returns:
        (the other arguments; the keys whose value is None in the end).
    """
    given = _config_flags(argv, name)
    spec = next((text or following for key, text, following in given if not key), None)
    if spec is None or not any(key and _is_none(following if text is None else text) for key, text, following in given):
        return list(argv), []
    config = _load(spec)
    kept: list[str] = []
    none_last: dict[str, bool] = {}  # {key: True if the last value given for it is None}
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
        none_last[key] = _is_none(text) and _may_be_none(key, config_path.get_value(key, config))
        if not none_last[key]:
            kept += pair
    return kept, [key for key, none in none_last.items() if none]


def parse_flags(
    argv: Sequence[str], name: str = "config", tell: Callable[[Exception, Sequence[str]], Exception] | None = None
) -> list[str]:
    """Parse the command line into absl's flags; a mistake in it ends the process with one line and status 2.

    Args:
        argv: the program's name and its arguments.
        name: the name of the configuration's flag.
        tell: see `run`.

    Returns:
        What remains of argv: the program's name.
    """
    try:
        given = flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False)
        check_overrides(given, name)
        given, none = _without_none(given, name)
        try:
            rest = flags.FLAGS([argv[0], *given])
        except SystemExit:  # --help; absl's status for it is 1
            raise SystemExit(0) from None
        if flags.FLAGS[name].value is None:
            raise ConfigError(f"give a configuration: --{name}=configs/NAME.py")
        if len(rest) > 1:
            raise ConfigError(f"unexpected argument {rest[1]!r}{did_you_mean(rest[1], list(flags.FLAGS))}")
        for key in none:
            config_path.set_value(key, flags.FLAGS[name].value, None)
    except (ConfigError, flags.Error) as error:
        fail(error if tell is None else tell(error, argv))
    return rest


# Running


def fail(error: Exception) -> NoReturn:
    """Print a user's error to stderr and exit with status 2."""
    print_error(error)
    raise SystemExit(USAGE_ERROR)


def print_error(error: Exception) -> None:
    """Print a user's error to stderr."""
    print(f"{program()}: error: {error}", file=sys.stderr, flush=True)


def run(
    main: Callable[[list[str]], Any],
    *,
    errors: tuple[type[Exception], ...] = (ConfigError,),
    tell: Callable[[Exception, Sequence[str]], Exception] | None = None,
) -> NoReturn:
    """Run a script with a `--config` flag by `absl.app.run`; a user's mistake ends it with one message and status 2.

    Ctrl-C ends it with one line and status 130; a second Ctrl-C ends it at once. If its output cannot be written, it
    ends as described in `command.run`.

    Args:
        main: called with [program name].
        errors: exceptions of `main` whose message is for the user; any other keeps its traceback.
        tell: called with an error and the command line before the process ends; returns the error to report.
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
            print(f"{program()}: interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            if tell is not None:
                tell(error, sys.argv)
            raise

    end_at_second_interrupt()
    command.run(script)
