"""The command line of a script with a --config flag."""

import json
import runpy
import textwrap
from types import SimpleNamespace

import pytest

from osdn_jax.training import ConfigError, command_line, parse_arg
from osdn_jax.training.workdir import check_workdir
from support.forks import Forks

CONFIG = """
    from ml_collections import ConfigDict, config_dict
    from osdn_jax.training import parse_arg

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
    from osdn_jax.training import command_line, workdir

    CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "where the run writes")

    def main(argv):
        if WORKDIR.value:
            workdir.check_workdir(WORKDIR.value, CONFIG.value, may_differ=("steps",))
        print(CONFIG.value.to_json())

    if __name__ == "__main__":
        command_line.run(main)
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
    got = parse_arg("a=3,b=1e-2,c=false,d=x=y,e", a=1, b=0.5, c=True, d="s", e=False, f=7)
    assert got.to_dict() == {"a": 3, "b": 0.01, "c": False, "d": "x=y", "e": True, "f": 7}
    assert [type(got[k]) for k in "abcd"] == [int, float, bool, str]
    assert parse_arg(None, a=1).to_dict() == parse_arg("", a=1).to_dict() == {"a": 1}


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
    with pytest.raises(ConfigError) as error:
        parse_arg(arg, rule="osdn", seed=0)
    assert isinstance(error.value, ValueError)
    for text in said:
        assert text in str(error.value)


def test_parse_arg_refuses_a_default_without_a_readable_type():
    with pytest.raises(TypeError, match="'shape'"):
        parse_arg(None, shape=(1, 2))


# The command line


def check(script, *overrides, spec="demo.py"):
    command_line.check_overrides([f"--config={script / spec}", *overrides])


def test_check_accepts_what_config_flags_accepts(script):
    check(script, "--config.optimizer.learning_rate=1e-3", "--config.steps", "7", "--config.tiny", "--noconfig.tiny")
    check(
        script, "--config.shape=(3,4)", "--config.limit=3", "--config.model.rule=kda", "--workdir=x", "--", "--config.x"
    )
    command_line.check_overrides(["--workdir=x"])


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
    with pytest.raises(ConfigError) as error:
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
        with pytest.raises(ConfigError) as error:
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
    with pytest.raises(ConfigError) as error:
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
    check_workdir(tmp_path, runpy.run_path(str(script / "demo.py"))["get_config"]())
    done = command("--config=demo.py", f"--workdir={tmp_path}", "--config.model.layers=3")
    assert done.returncode == 2
    assert "model.layers: 2 there, 3 now" in done.stderr
    assert "Traceback" not in done.stderr
