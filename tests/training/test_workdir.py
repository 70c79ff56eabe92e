"""The record of a configuration in a run's working directory."""

import pytest
from ml_collections import ConfigDict, config_dict

from osdn_jax.training import ConfigError, WorkdirConfigError, default_config, load_config
from osdn_jax.training.config import ABSENT
from osdn_jax.training.workdir import check_workdir, checked_workdir, config_difference, save_config


def config(**changes):
    base = {"steps": 100, "log_every": 10, "shape": (1, 2), "model": {"rule": "osdn", "layers": 2}}
    return ConfigDict(base | changes)


def test_config_difference():
    assert config_difference(config(), config()) == []
    assert config_difference(config(shape=(1, 2)), config(shape=[1, 2])) == []
    assert config_difference(config(steps=1), config(steps=True)) == [("steps", 1, True)]
    other = config(model={"rule": "osdn", "heads": 4}, steps=5)
    assert config_difference(config(), other) == [
        ("model.heads", ABSENT, 4),
        ("model.layers", 2, ABSENT),
        ("steps", 100, 5),
    ]
    assert config_difference(config(model={}), config())[0] == ("model", {}, ABSENT)


def test_saved_configuration_loads_equal(tmp_path):
    saved = config(limit=config_dict.placeholder(int), rate=1e-3, name="ö")
    save_config(tmp_path, saved)
    assert config_difference(load_config(tmp_path), saved) == []
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_save_refuses_what_json_cannot_hold_and_leaves_no_file(tmp_path):
    with pytest.raises(ConfigError, match="JSON"):
        save_config(tmp_path, config(dtype=object()))
    assert list(tmp_path.iterdir()) == []


def test_load_says_what_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_config(tmp_path)
    for broken in ('{"a": 1', "[1]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_config(tmp_path)


def test_workdir_of_the_same_run_is_accepted(tmp_path):
    workdir = tmp_path / "new" / "run"
    assert check_workdir(workdir, config()) == []
    assert check_workdir(workdir, config()) == []
    assert config_difference(load_config(workdir), config()) == []


def test_workdir_of_another_run_is_refused_and_left_alone(tmp_path):
    check_workdir(tmp_path, config())
    with pytest.raises(WorkdirConfigError) as error:
        check_workdir(tmp_path, config(steps=5, model={"rule": "kda", "layers": 2}), may_differ=("log_every",))
    for text in ("model.rule: 'osdn' there, 'kda' now", "steps: 100 there, 5 now", "--workdir", "old values"):
        assert text in str(error.value)
    assert config_difference(load_config(tmp_path), config()) == []


def test_keys_that_may_differ_are_reported_and_recorded(tmp_path):
    check_workdir(tmp_path, config())
    changed = config(log_every=50, model={"rule": "kda", "layers": 2})
    assert check_workdir(tmp_path, changed, may_differ=("log_every", "model")) == [
        ("log_every", 10, 50),
        ("model.rule", "osdn", "kda"),
    ]
    assert load_config(tmp_path).log_every == 50
    with pytest.raises(WorkdirConfigError, match="log_every"):  # a prefix consists of whole keys
        check_workdir(tmp_path, config(model={"rule": "kda", "layers": 2}), may_differ=("log", "model"))


def test_foreign_files_are_fine_but_checkpoints_without_a_configuration_are_not(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    check_workdir(tmp_path, config())
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "100").mkdir()
    with pytest.raises(WorkdirConfigError, match=r"holds checkpoints, but there is no config\.json"):
        check_workdir(tmp_path, config())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirConfigError, match="is a file"):
        check_workdir(tmp_path / "file", config())


@pytest.mark.parametrize(
    "name", ["", " ", "gs://bucket/run", "s3://bucket", "file:///runs/run", "gs:/bucket/run", "hdfs+x://a", "a\0b"]
)
def test_what_is_no_directory_is_refused_and_nothing_is_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for call in (checked_workdir, lambda name: check_workdir(name, config()), load_config):
        with pytest.raises(ConfigError, match="--workdir=") as error:
            call(name)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    check_workdir("~/runs/one", config())
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert load_config("~/runs/one").steps == 100
    assert checked_workdir("runs/a:b c~/d").parts == ("runs", "a:b c~", "d")
    with pytest.raises(ConfigError, match="~nobody-of-that-name"):
        checked_workdir("~nobody-of-that-name/run")


def test_a_key_that_an_older_version_did_not_have_is_its_default(tmp_path):
    now, then = default_config(), default_config()
    del then.model["key_norm"], then.model["fixed_beta"]
    save_config(tmp_path, then)
    now.log_every = 5
    assert check_workdir(tmp_path, now, may_differ=["log_every"]) == [("log_every", 10, 5)]
    assert load_config(tmp_path).model.key_norm is True
    save_config(tmp_path, then)
    now.model.key_norm = False
    with pytest.raises(WorkdirConfigError, match="model.key_norm: True there, False now"):
        check_workdir(tmp_path, now, may_differ=["log_every"])
