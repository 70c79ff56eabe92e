"""The ranges of a configuration's numbers: every key is in the table, and NaN is in no range."""

import math

import pytest
from ml_collections import ConfigDict

from osdn_jax.training import ConfigError, check_ranges, default_config, train
from osdn_jax.training.config import flatten
from osdn_jax.training.ranges import RANGES
from support.runs import text, tiny_config

DEFAULTS = flatten(default_config())
FLOATS = [key for key, x in RANGES.items() if x.kind is float]
COUNTS = [key for key, x in RANGES.items() if x.kind is int]


def with_value(key, value):
    """Return the default configuration with a value of any type, as a configuration read from JSON may have."""
    config = default_config().to_dict()
    *parents, last = key.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return ConfigDict(config)


def refused(key, value):
    with pytest.raises(ValueError, match=rf"^{key}\b.*{'nan' if value != value else ''}") as error:
        check_ranges(with_value(key, value))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_number_of_the_configuration_has_a_range():
    config = default_config()
    for key in DEFAULTS:
        *parents, last = key.split(".")
        holder = config
        for parent in parents:
            holder = holder[parent]
        kind = holder.get_type(last)
        assert (RANGES[key].kind if key in RANGES else kind) == kind, key
        assert (key in RANGES) == (kind in (int, float)), key
    assert RANGES.keys() <= DEFAULTS.keys()
    check_ranges(config)


@pytest.mark.parametrize("key", RANGES)
def test_nan_and_what_is_no_number_is_in_no_range(key):
    refused(key, math.nan)
    refused(key, -math.inf)
    refused(key, True)
    refused(key, "3")
    refused(key, [3])
    if key != "optimizer.clip_norm":  # for which infinity is valid
        refused(key, math.inf)
    if DEFAULTS[key] is None:
        check_ranges(with_value(key, None))
    else:
        refused(key, None)


@pytest.mark.parametrize("key", COUNTS)
def test_the_ends_of_a_count(key):
    least, most = RANGES[key].least, RANGES[key].most
    for inside in (least, max(least, 1), most):
        check_ranges(with_value(key, inside))
    assert str(least - 1) in refused(key, least - 1)
    assert refused(key, most + 1) == f"{key}: got {most + 1}, expected at most {most}"
    refused(key, 1.5)


@pytest.mark.parametrize(
    ("key", "inside", "outside"),
    [
        ("ema", (0.0, 0.999, 0), (-1e-9, 1.0, 1 - 1e-9)),
        ("model.dropout", (0.0, 0.5), (-0.1, 1.0)),
        ("optimizer.beta1", (0.0, 0.9), (-0.1, 1.0, 1 - 1e-9)),  # the last is 1 in float32
        ("optimizer.beta2", (0.0, 0.999999), (1.5, 1 - 1e-9)),
        ("optimizer.muon_momentum", (0.0, 0.95), (1.0,)),
        ("optimizer.final_fraction", (0.0, 0.1, 1.0, 0, 1), (-1.0, -1e-9, 1.1)),
        ("optimizer.learning_rate", (1e-30, 1e30, 1), (0.0, -1e-3, 1e-46, 1e39)),  # 0 and infinity in float32
        ("optimizer.muon_learning_rate", (1e-3,), (0.0, 1e39)),
        ("optimizer.weight_decay", (0.0, 1e3), (-0.1, 1e39)),
        ("optimizer.clip_norm", (1e-3, 1e9, math.inf), (0.0, -1.0)),
        ("loss.balance", (0.0, 1e-2), (-1e-4, 1e39)),
        ("loss.z_loss", (0.0, 1e-4), (-1e-4, 1e39)),
        ("model.anchor", (0.0, -2.5, 1e9), (1e39,)),
        ("model.eta", (0.0, 0.5, 1e30), (-0.1, 1e39)),
        ("model.initial", (0.0, -2.5, 1e9), (1e39,)),
        ("model.forget_constant", (1e-30, 0.999, 1.0, 1), (0.0, -0.1, 1.1, 1e-46)),
        ("model.squash", (0.5, 2.0), (0.0, -1.0, 1e39)),
        ("model.fixed_beta", (0.5, 1.0, 1), (0.0, -1.0, 1e39)),
        ("model.rotary_base", (2.0, 5e5), (1.0, 1 + 1e-9, 0.0, 1e39)),
        ("data.validation_fraction", (0.0, 0.5, 1.0), (-0.1, 1.1)),
    ],
)
def test_the_ends_of_a_number(key, inside, outside):
    for value in inside:
        check_ranges(with_value(key, value))
    for value in outside:
        assert repr(value) in refused(key, value)


def test_every_number_that_is_no_count_has_its_ends_tested():
    (mark,) = test_the_ends_of_a_number.pytestmark
    assert sorted(case[0] for case in mark.args[1]) == sorted(FLOATS)


def test_nan_is_refused_in_keys_of_ones_own_and_prefixes_choose():
    config = default_config()
    config.mine = math.nan
    with pytest.raises(ValueError, match="^mine: got nan"):
        check_ranges(config)
    check_ranges(config, "model.", "optimizer.")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer__final_fraction": -1.0}, "optimizer.final_fraction: got -1.0, expected from 0 to 1"),
        ({"optimizer__final_fraction": math.nan}, "optimizer.final_fraction: got nan"),
        ({"optimizer__learning_rate": math.inf}, "optimizer.learning_rate: got inf, expected more than 0 and finite"),
        ({"optimizer__weight_decay": math.inf}, "optimizer.weight_decay: got inf"),
        ({"optimizer__muon_learning_rate": math.nan}, "optimizer.muon_learning_rate: got nan"),
        ({"model__anchor": math.nan}, "model.anchor: got nan"),
        ({"validation__windows": -1}, "validation.windows: got -1, expected at least 0"),
        ({"data__shuffle_windows": 0}, "data.shuffle_windows: got 0, expected at least 1"),
        ({"data__validation_documents": -1}, "data.validation_documents: got -1"),
        ({"hang_seconds": 10**10}, "hang_seconds: got 10000000000, expected at most 2147483647"),
        ({"seed": 2**32}, "seed: got 4294967296, expected at most 4294967295"),
        ({"steps": 2**31}, "steps: got 2147483648, expected at most 2147483647"),
    ],
)
def test_train_refuses_them_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        train(tiny_config(text(), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
