"""The command line and the record of a configuration in the working directory."""

import json
import runpy
import textwrap
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict, config_dict

from osdn_jax.training import command_line as C
from support.forks import Forks

CONFIG = """
    from ml_collections import ConfigDict, config_dict
    from osdn_jax.training.command_line import parse_arg

    def get_config(arg=None):
        arg = parse_arg(arg, rule="osdn", seed=0, tiny=False)
        return ConfigDict(dict(
            seed=arg.seed, steps=100, shape=(1, 2), tiny=arg.tiny, unset=None, limit=config_dict.placeholder(int),
            model=dict(rule=arg.rule, layers=2),
            optimizer=dict(learning_rate=1e-3, warmup_steps=10),
        ))
"""

SCRIPT = """
    from absl import flags
    from ml_collections import config_flags
    from osdn_jax.training import command_line as config

    CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "where the run writes")

    def main(argv):
        if WORKDIR.value:
            config.check_workdir(WORKDIR.value, CONFIG.value, may_differ=("steps",))
        print(CONFIG.value.to_json())

    if __name__ == "__main__":
        config.run(main)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    (folder / "demo.py").write_text(textwrap.dedent(CONFIG))
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    (folder / "empty.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def command(script, request):
    with Forks(env={"PYTHONPATH": str(request.config.rootpath), "PATH": ""}, cwd=script) as forks:

        def call(*args):
            forks.start(["train.py", *args], out=script / "out", err=script / "err")
            status = forks.wait(60)
            return SimpleNamespace(
                returncode=status, stdout=(script / "out").read_text(), stderr=(script / "err").read_text()
            )

        yield call


# parse_arg


def test_parse_arg_reads_values_by_the_type_of_their_defaults():
    got = C.parse_arg("a=3,b=1e-2,c=false,d=x=y,e", a=1, b=0.5, c=True, d="s", e=False, f=7)
    assert got.to_dict() == {"a": 3, "b": 0.01, "c": False, "d": "x=y", "e": True, "f": 7}
    assert [type(got[k]) for k in "abcd"] == [int, float, bool, str]
    assert C.parse_arg(None, a=1).to_dict() == C.parse_arg("", a=1).to_dict() == {"a": 1}


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("ruel=kda", ["'ruel'", "did you mean rule?", "rule, seed"]),
        ("seed=three", ["seed=three", "an int", "rule, seed"]),
        ("seed=1.5", ["seed=1.5", "an int"]),
        ("seed", ["'seed'", "needs a value"]),
        ("seed=1,seed=2", ["'seed'", "twice"]),
    ],
)
def test_parse_arg_names_what_is_wrong(arg, said):
    with pytest.raises(C.ConfigError) as error:
        C.parse_arg(arg, rule="osdn", seed=0)
    assert isinstance(error.value, ValueError)
    for text in said:
        assert text in str(error.value)


def test_parse_arg_refuses_a_default_without_a_readable_type():
    with pytest.raises(TypeError, match="'shape'"):
        C.parse_arg(None, shape=(1, 2))


# The command line


def check(script, *overrides, spec="demo.py"):
    C.check_overrides([f"--config={script / spec}", *overrides])


def test_check_accepts_what_config_flags_accepts(script):
    check(script, "--config.optimizer.learning_rate=1e-3", "--config.steps", "7", "--config.tiny", "--noconfig.tiny")
    check(
        script, "--config.shape=(3,4)", "--config.limit=3", "--config.model.rule=kda", "--workdir=x", "--", "--config.x"
    )
    C.check_overrides(["--workdir=x"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["--config.optimizer.learning_rat=1"], ["'optimizer.learning_rat'", "did you mean optimizer.learning_rate"]),
        (["--config.learning_rate=1"], ["'learning_rate'", "did you mean optimizer.learning_rate?"]),
        (["--config.optimizer.learning_rate.x=1"], ["'optimizer.learning_rate.x'", "did you mean"]),
        (["--config.qqqq=1"], ["has no key 'qqqq'"]),
        (["--config.steps=many"], ["--config.steps=many", "an int", "100"]),
        (["--config.steps", "many"], ["--config.steps=many", "an int"]),
        (["--config.steps=1.5"], ["--config.steps=1.5", "an int"]),
        (["--config.optimizer.learning_rate=fast"], ["learning_rate=fast", "a float"]),
        (["--config.tiny=perhaps"], ["--config.tiny=perhaps", "a bool"]),
        (["--config.limit=x"], ["--config.limit=x", "an int"]),
        (["--config.unset=3"], ["--config.unset", "None", "placeholder"]),
    ],
)
def test_check_names_the_key_and_the_nearest(script, override, said):
    with pytest.raises(C.ConfigError) as error:
        check(script, *override)
    for text in said:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_none_is_a_value_where_it_is_the_default(script):
    for none in (["--config.limit=None"], ["--config.limit", "None"], ["--config.limit=none"]):
        check(script, *none)
    for wrong, said in {
        "--config.limit=often": "--config.limit=often: expected an int or None",
        "--config.steps=None": "--config.steps=None: expected an int, such as 100",
    }.items():
        with pytest.raises(C.ConfigError) as error:
            check(script, wrong)
        assert str(error.value) == said


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("dmeo.py", ["no configuration file", "dmeo.py", "did you mean", "demo.py"]),
        ("nowhere/demo.py", ["no configuration file"]),
        ("empty.py", ["get_config"]),
        ("demo.py:ruel=kda", ["'ruel'", "did you mean rule?"]),
    ],
)
def test_check_names_a_wrong_configuration_file(script, spec, said):
    with pytest.raises(C.ConfigError) as error:
        check(script, spec=spec)
    for text in said:
        assert text in str(error.value)


def test_a_good_command_line_runs(command):
    done = command("--config=demo.py:rule=delta_net,seed=3", "--config.optimizer.learning_rate=0.5", "--noconfig.tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert '"rule": "delta_net"' in done.stdout
    assert '"learning_rate": 0.5' in done.stdout


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (["--config.limit=None"], None),
        (["--config.limit=None", "--config.limit=5"], 5),
        (["--config.limit", "5", "--config.limit", "None", "--config.tiny"], None),
    ],
)
def test_none_on_the_command_line(command, given, limit):
    done = command("--config=demo.py", *given)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["limit"] == limit
    assert json.loads(done.stdout)["tiny"] == ("--config.tiny" in given)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--config=demo.py", "--config.optimizer.learning_rat=1"], "optimizer.learning_rate"),
        (["--config=demo.py", "--wrkdir=x"], "workdir"),
        (["--config=demo.py", "config.steps=3"], "unexpected argument 'config.steps=3'"),
        ([], "--config=configs/NAME.py"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(command, args, said):
    done = command(*args)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("train.py: error: ")
    assert done.stderr.count("\n") == 1


def test_a_workdir_of_another_run_ends_without_a_traceback(command, script, tmp_path):
    C.check_workdir(tmp_path, runpy.run_path(str(script / "demo.py"))["get_config"]())
    done = command("--config=demo.py", f"--workdir={tmp_path}", "--config.model.layers=3")
    assert done.returncode == 2
    assert "model.layers: 2 there, 3 now" in done.stderr
    assert "Traceback" not in done.stderr


# Comparing and recording


def config(**changes):
    base = {"steps": 100, "log_every": 10, "shape": (1, 2), "model": {"rule": "osdn", "layers": 2}}
    return ConfigDict(base | changes)


def test_config_difference():
    assert C.config_difference(config(), config()) == []
    assert C.config_difference(config(shape=(1, 2)), config(shape=[1, 2])) == []
    assert C.config_difference(config(steps=1), config(steps=True)) == [("steps", 1, True)]
    other = config(model={"rule": "osdn", "heads": 4}, steps=5)
    assert C.config_difference(config(), other) == [
        ("model.heads", C.ABSENT, 4),
        ("model.layers", 2, C.ABSENT),
        ("steps", 100, 5),
    ]
    assert C.config_difference(config(model={}), config())[0] == ("model", {}, C.ABSENT)


def test_saved_configuration_loads_equal(tmp_path):
    saved = config(limit=config_dict.placeholder(int), rate=1e-3, name="ö")
    C.save_config(tmp_path, saved)
    assert C.config_difference(C.load_config(tmp_path), saved) == []
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_save_refuses_what_json_cannot_hold_and_leaves_no_file(tmp_path):
    with pytest.raises(C.ConfigError, match="JSON"):
        C.save_config(tmp_path, config(dtype=object()))
    assert list(tmp_path.iterdir()) == []


def test_load_says_what_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        C.load_config(tmp_path)
    for broken in ('{"a": 1', "[1]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(C.ConfigError, match=r"config\.json"):
            C.load_config(tmp_path)


def test_workdir_of_the_same_run_is_accepted(tmp_path):
    workdir = tmp_path / "new" / "run"
    assert C.check_workdir(workdir, config()) == []
    assert C.check_workdir(workdir, config()) == []
    assert C.config_difference(C.load_config(workdir), config()) == []


def test_workdir_of_another_run_is_refused_and_left_alone(tmp_path):
    C.check_workdir(tmp_path, config())
    with pytest.raises(C.WorkdirConfigError) as error:
        C.check_workdir(tmp_path, config(steps=5, model={"rule": "kda", "layers": 2}), may_differ=("log_every",))
    for text in ("model.rule: 'osdn' there, 'kda' now", "steps: 100 there, 5 now", "--workdir", "old values"):
        assert text in str(error.value)
    assert C.config_difference(C.load_config(tmp_path), config()) == []


def test_keys_that_may_differ_are_reported_and_recorded(tmp_path):
    C.check_workdir(tmp_path, config())
    changed = config(log_every=50, model={"rule": "kda", "layers": 2})
    assert C.check_workdir(tmp_path, changed, may_differ=("log_every", "model")) == [
        ("log_every", 10, 50),
        ("model.rule", "osdn", "kda"),
    ]
    assert C.load_config(tmp_path).log_every == 50
    with pytest.raises(C.WorkdirConfigError, match="log_every"):  # a prefix is of whole parts
        C.check_workdir(tmp_path, config(model={"rule": "kda", "layers": 2}), may_differ=("log", "model"))


def test_foreign_files_are_fine_but_checkpoints_without_a_configuration_are_not(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    C.check_workdir(tmp_path, config())
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints" / "100").mkdir()
    with pytest.raises(C.WorkdirConfigError, match=r"holds checkpoints, but there is no config\.json"):
        C.check_workdir(tmp_path, config())
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(C.WorkdirConfigError, match="is a file"):
        C.check_workdir(tmp_path / "file", config())


@pytest.mark.parametrize(
    "name", ["", " ", "gs://bucket/run", "s3://bucket", "file:///tmp/run", "gs:/bucket/run", "hdfs+x://a", "a\0b"]
)
def test_what_is_no_directory_is_refused_and_nothing_is_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for call in (C.checked_workdir, lambda name: C.check_workdir(name, config()), C.load_config):
        with pytest.raises(C.ConfigError, match="--workdir=") as error:
            call(name)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    C.check_workdir("~/runs/one", config())
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert C.load_config("~/runs/one").steps == 100
    assert C.checked_workdir("runs/a:b c~/d").parts == ("runs", "a:b c~", "d")
    with pytest.raises(C.ConfigError, match="~nobody-of-that-name"):
        C.checked_workdir("~nobody-of-that-name/run")
