"""Reports of processes: differences and failures, in one line."""

import math

import pytest

from osdn_jax.training import ConfigError
from osdn_jax.training.reports import check_same, differences, failures, name_processes, software


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "process 3"),
        ([0, 1], "processes 0-1"),
        ([0, 2], "processes 0 and 2"),
        ([0, 1, 2, 5, 7, 8], "processes 0-2, 5 and 7-8"),
    ],
)
def test_processes_in_words(numbers, words):
    assert name_processes(numbers) == words


def test_differences():
    run = {"seed": 0, "optimizer.learning_rate": 3e-3, "data.path": "a", "steps": 10}
    assert differences([run, run, run]) == []
    assert differences([run, run | {"seed": 1}, run]) == [
        "seed: got 0 in processes 0 and 2 and 1 in process 1, expected the same in all"
    ]
    assert differences([run, run | {"optimizer.learning_rate": 1e-3}]) == [
        "optimizer.learning_rate: got 0.003 in process 0 and 0.001 in process 1, expected the same in all"
    ]
    assert differences([run | {"new": True}, None, run]) == [
        "new: got True in process 0 and (absent) in process 2, expected the same in all"
    ]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [(1, 1.0, True), (1, True, False), (None, "None", False), (math.nan, math.nan, True), ("1", 1, False)]
    + [(0.1, 0.1 + 1e-16, False), (10**400, 10**400 + 1, False), ([1, 2], [1, 2], True), (math.inf, -math.inf, False)],
)
def test_what_is_the_same(a, b, same):
    assert (differences([{"key": a}, {"key": b}]) == []) == same


def test_many_differences_are_one_line():
    check_same([{}, {}])
    with pytest.raises(ConfigError) as error:
        check_same([{f"key{i}": 0 for i in range(6)}, {f"key{i}": 1 for i in range(6)}])
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("; and 2 more")
    assert "key3: got 0 in process 0 and 1 in process 1, expected the same in all" in str(error.value)


def test_who_failed():
    assert failures([None, None]) == ""
    assert failures([None, "no such file", None]) == "process 1 failed: no such file"
    assert failures(["a", None, "b", "a"]) == "processes 0 and 3 failed: a; process 2 failed: b"
    assert failures(["no such file"] * 3) == "no such file"  # a mistake of all names no process


def test_the_software_is_named():
    found = software()
    assert {"osdn_jax", "jax", "jaxlib", "flax", "optax"} <= set(found)
    assert "unknown" not in found.values()
