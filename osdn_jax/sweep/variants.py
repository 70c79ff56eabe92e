"""The variants of a sweep: a rule, or a named change of the configuration's keys."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from osdn_jax.nn import RULES
from osdn_jax.training.command_line import did_you_mean, parse_value
from osdn_jax.training.config import ConfigError, default_config, flatten

# Keys that differ between the runs of a variant, or that no result depends on.
_NOT_SETTINGS = ("seed", "optimizer.learning_rate", "max_skipped_steps", "log_every", "hang_seconds")
_NOT_SETTINGS_OF = ("checkpoint.", "mesh.")


class Variant(NamedTuple):
    """A configuration with a name.

    Attributes:
        label: its name in tables and figures.
        config: with the keys of `default_config`.
    """

    label: str
    config: ConfigDict

    @property
    def settings(self) -> dict[str, Any]:
        """{dotted key: value} of all that a result depends on, except seed and learning rate."""
        return settings_of(flatten(self.config))


def settings_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that a result depends on, except seed and learning rate; a missing key has its default."""
    full = flatten(default_config()) | dict(flat)
    return {
        key: value
        for key, value in sorted(full.items())
        if key not in _NOT_SETTINGS and not key.startswith(_NOT_SETTINGS_OF)
    }


def make_variants(
    base: ConfigDict, rules: Iterable[str], given: Iterable[str] = (), declared: Mapping[str, str] | None = None
) -> list[Variant]:
    """Return the variants of a sweep, in order.

    Args:
        base: the configuration that all of them change.
        rules: each a key of `declared` or of `nn.RULES`.
        given: each "NAME: RULE KEY=VALUE …", such as "trust: osdn model.preset=trust model.anchor=1". Without a rule
            it is that of `base`.
        declared: {name: "RULE KEY=VALUE …"}, variants that `rules` may name.

    Raises:
        ConfigError: an unknown rule or key, a value that cannot be parsed, or two variants of one name or of the same
            settings.

    Example:
        >>> from osdn_jax.training import default_config
        >>> trust, pdn = make_variants(default_config(), ["pdn"], ["trust: osdn model.preset=trust"])[::-1]
        >>> trust.label, trust.config.model.rule, trust.config.model.preset, pdn.label
        ('trust', 'osdn', 'trust', 'pdn')
    """
    declared = declared or {}
    variants = []
    for rule in rules:
        if rule not in declared and rule not in RULES:
            known = [*declared, *RULES]
            raise ConfigError(f"--rules: got {rule!r}, expected some of {', '.join(known)}{did_you_mean(rule, known)}")
        variants.append(_variant(base, "--rules", rule, declared.get(rule, rule)))
    for text in given:
        label, colon, changes = (part.strip() for part in text.partition(":"))
        if not colon or not label or "=" in label:
            raise ConfigError(f"--variant: got {text!r}, expected 'NAME: RULE KEY=VALUE …'")
        variants.append(_variant(base, "--variant", label, changes))
    for i, variant in enumerate(variants):
        for other in variants[:i]:
            if other.label == variant.label:
                raise ConfigError(f"got two variants of the name {variant.label!r}, expected different names")
            if other.settings == variant.settings:
                raise ConfigError(f"{variant.label!r} has the same settings as {other.label!r}, expected one of them")
    return variants


def _variant(base: ConfigDict, flag: str, label: str, text: str) -> Variant:
    words = text.split()
    config = copy.deepcopy(base)
    if words and "=" not in words[0]:
        rule = words.pop(0)
        if rule not in RULES:
            near = did_you_mean(rule, [*RULES])
            raise ConfigError(f"{flag} {label}: got the rule {rule!r}, expected one of {', '.join(RULES)}{near}")
        config.model.rule = rule
    change(config, words, f"{flag} {label}")
    return Variant(label, config)


def change(config: ConfigDict, assignments: Iterable[str], place: str) -> None:
    """Set keys of a configuration.

    Args:
        config: changed in place.
        assignments: each "KEY=VALUE" with a dotted key; the value None is that of keys whose default is None.
        place: what to name in errors, such as "--set".

    Raises:
        ConfigError: an unknown key, or a value of another type than the key's.
    """
    valid = list(flatten(config))
    for item in assignments:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"{place}: got {item!r}, expected KEY=VALUE, such as model.preset=trust")
        if key in ("seed", "optimizer.learning_rate") and place != "--set":
            raise ConfigError(f"{place}: got {item!r}, but seeds and learning rates are those of the whole sweep")
        if key not in valid:
            raise ConfigError(f"{place}: there is no key {key!r}{did_you_mean(key, valid)}")
        kind = config_path.get_type(key, config)
        try:
            value = None if text == "None" and _may_be_none(config, key) else parse_value(text, kind)
        except ValueError as error:
            raise ConfigError(f"{place}: got {item!r}: {error}") from None
        config_path.set_value(key, config, value)


def _may_be_none(config: ConfigDict, key: str) -> bool:
    return flatten(config)[key] is None or flatten(default_config()).get(key, 0) is None
