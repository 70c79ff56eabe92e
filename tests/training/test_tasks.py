"""A run on a recall task: its windows, what its keys say, training and resuming."""

import json

import numpy as np
import pytest

from osdn_jax.data.recall import IGNORE, TASKS, mqar, parse_task
from osdn_jax.planning import planner
from osdn_jax.training import build_data, build_model_config, build_tokenizer, load_config, load_trained, train
from osdn_jax.training.config import ConfigError
from osdn_jax.training.tasks import with_task
from osdn_jax.training.workdir import CONFIG_FILE, check_workdir
from support.runs import assert_same_run, tiny_config

TASK = "mqar:length=16,pairs=2,vocabulary=32"


def config_of(**changes):
    settings = {
        "data__task": TASK,
        "data__task_examples": 64,
        "data__validation_examples": 5,
        "model__rule": "delta_net",
        "steps": 6,
        "validation__every": 3,
        "checkpoint__every": 3,
    }
    return tiny_config("", **(settings | changes))


def test_windows_are_those_of_the_generator():
    data = build_data(config_of())
    for windows, part, count in ((data.train, 0, 64), (data.held_out, 1, 5)):
        tokens, targets = mqar(count, 16, 2, vocabulary=32, seed=(0, part))
        assert len(windows) == count
        for i, window in enumerate(windows[i] for i in range(count)):
            np.testing.assert_array_equal(window["inputs"], tokens[i])
            np.testing.assert_array_equal(window["weights"], (targets[i] != IGNORE).astype(np.float32))
            np.testing.assert_array_equal(window["targets"], np.maximum(targets[i], 0))
            assert not window["segment_ids"].any()
    assert data.questions == 2
    assert data.summary == "64 examples of mqar to train on, 5 held out"


def test_the_task_sets_lengths_and_vocabulary():
    config = with_task(config_of(data__validation_task="mqar:length=40,pairs=6,vocabulary=48"))
    assert (config.sequence_length, config.validation.sequence_length) == (16, 40)
    assert build_model_config(config).vocab_size == 48
    assert build_data(config).held_out[0]["inputs"].shape == (40,)
    assert build_data(config).questions == 6
    assert build_model_config(config_of(model__vocab_size=256)).vocab_size == 256
    assert build_model_config(config_of(model__rule="transformer")).mixer.max_length == 16
    without = with_task(config_of(data__task="mqar:pairs=2,vocabulary=32"))
    assert without.sequence_length == without.validation.sequence_length == 24  # the key's


def test_fingerprints_are_of_the_task():
    one, same, other, longer = (
        build_data(config_of(**changes)).fingerprints
        for changes in (
            {},
            {"data__task": f"{TASK},seed=0,reads=1"},
            {"data__task": f"{TASK},seed=1"},
            {"data__task_examples": 65},
        )
    )
    assert one == same
    assert one["text"] != other["text"]
    assert one["held-out text"] != other["held-out text"]
    assert one["text"] != longer["text"]
    assert one["held-out text"] == longer["held-out text"]


def test_a_run_trains_validates_and_resumes(tmp_path):
    rows = []
    result = train(config_of(), tmp_path / "once", on_metrics=lambda step, values: rows.append((step, values)))
    validated = {step: values for step, values in rows if "validation/accuracy" in values}
    assert sorted(validated) == [3, 6]
    assert all(0 <= values["validation/accuracy"] <= 1 for values in validated.values())
    assert result.bits_per_byte == validated[6]["validation/bits_per_byte"]
    assert 3 < result.bits_per_byte < 8  # 4 bits are the chance level
    train(config_of(), tmp_path / "twice", stop_at=3)
    train(config_of(), tmp_path / "twice")
    assert_same_run(tmp_path / "twice", tmp_path / "once", step=6)
    run = load_trained(tmp_path / "once")
    assert (run.step, run.model.vocab_size, run.config.sequence_length) == (6, 32, 16)
    with pytest.raises(ConfigError, match="data.task: 'mqar.*' there, 'mqar.*seed=1' now"):
        train(config_of(data__task=f"{TASK},seed=1"), tmp_path / "once")


def test_a_configuration_without_the_keys_is_one_without_a_task(tmp_path):
    config = tiny_config("text.txt")
    check_workdir(tmp_path, config)
    old = json.loads((tmp_path / CONFIG_FILE).read_text())
    for key in ("task", "task_examples", "validation_task", "validation_examples"):
        del old["data"][key]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(old))
    assert check_workdir(tmp_path, config) == []
    assert with_task(load_config(tmp_path)).sequence_length == 24
    assert build_tokenizer(load_config(tmp_path)).vocab_size == 256


def test_a_plan_has_the_lengths_of_the_task(monkeypatch):
    def build_program(config, targets):
        raise ValueError(f"tokens per example: {config.sequence_length}")

    monkeypatch.setattr(planner, "build_program", build_program)
    with pytest.raises(ConfigError, match="tokens per example: 16"):
        planner.plan(config_of(), "1x1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__task": "mqqar:pairs=2"}, r"data.task: task: got 'mqqar', expected one of .*\(did you mean mqar\?\)"),
        ({"data__task": f"{TASK},paris=3"}, r"data.task: mqar: got the option 'paris', .* \(did you mean pairs\?\)"),
        ({"data__task": f"{TASK},pairs=3"}, "data.task: mqar: got 'pairs=3', expected pairs=VALUE, once"),
        ({"data__task": "mqar:pairs"}, "data.task: mqar: got 'pairs', expected pairs=VALUE, once"),
        ({"data__task": "mqar:pairs=x"}, "data.task: mqar: pairs: got 'x', expected an integer"),
        ({"data__task": "mqar:pairs=2,power=x"}, "data.task: mqar: power: got 'x', expected a number"),
        ({"data__task": "mqar:pairs=2,random_gaps=1"}, "data.task: mqar: random_gaps: got '1', expected true or false"),
        ({"data__task": "mqar"}, "data.task: mqar: got 'mqar' without pairs, expected pairs=VALUE"),
        ({"data__task": "mqar:length=16,pairs=9"}, "data.task: mqar: pairs: got 9 with length = 16"),
        ({"data__validation_task": "mqar:pairs=9"}, "data.validation_task: mqar: pairs: got 9 with length = 16"),
        ({"data__task": None, "data__validation_task": TASK}, "data.validation_task: got .* without data.task"),
        ({"data__path": "x.txt"}, "data.task: got 'mqar.*' beside data.path = 'x.txt'; give one of them"),
        ({"model__vocab_size": 31}, "model.vocab_size: got 31, expected at least 32, the vocabulary of data.task"),
    ],
)
def test_mistakes_end_in_one_line(changes, message):
    config = config_of(**changes)
    for build in (build_data, build_model_config):
        with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
            build(config)


def test_a_task_as_text_is_read_again():
    task = parse_task("mqar: length=16, pairs=2, random_gaps=FALSE, power=0.5, seed=7")
    assert parse_task(task.text) == task
    assert task.options["random_gaps"] is False
    assert task.seed == 7


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_trained_on(name):
    needed = {"mqar": "pairs=2", "forgetting_mqar": "pairs=2,updates=1", "drifting_mqar": "pairs=2"}.get(name, "")
    config = config_of(data__task=f"{name}:{needed}")
    data, task = build_data(config), parse_task(f"{name}:{needed}", length=24)
    window = data.train[0]
    assert window["inputs"].shape == (with_task(config).sequence_length,) == (task.length,)
    assert window["weights"].sum() >= 1
    assert max(window["inputs"].max(), window["targets"].max()) < build_model_config(config).vocab_size
    tokens, targets = task.generate(64)
    np.testing.assert_array_equal(window["inputs"], tokens[0])
    np.testing.assert_array_equal(window["targets"], np.maximum(targets[0], 0))


def test_an_auto_encoder_is_no_language_model():
    with pytest.raises(ValueError, match="^data.task: compression: autoencoder: got true, expected false: .*$"):
        build_data(config_of(data__task="compression:autoencoder=true"))
