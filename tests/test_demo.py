"""`make demo`, with models that train in a second."""

import functools
import re
import struct

import pytest

from examples import demo
from osdn_jax.training import ConfigError, Result, load_config
from support.runs import text

pytestmark = pytest.mark.slow

CONFIG = """
from osdn_jax.training import parse_arg
from support.runs import tiny_config

def get_config(arg=None):
    return tiny_config({path!r}, model__rule=parse_arg(arg, rule="osdn").rule)
"""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    (tmp_path / "demo.py").write_text(CONFIG.format(path=str(text())))
    monkeypatch.setattr(demo, "_CONFIG", tmp_path / "demo.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def parts(out):
    """Return (rows of the table by name, the sample)."""
    table = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if len(cells) == 4:
            table[cells[0]] = cells[1:]
    sample = re.search(r"300 characters from the OSDN model:\n\n(.*)\n\n\d+ min \d+ s in all", out, re.DOTALL)
    return table, sample[1]


def test_the_demo(configured, capsys):
    demo.main()
    table, sample = parts(capsys.readouterr().out)
    assert list(table) == ["model", "OSDN", "DeltaNet", "gzip -9", "xz -9"]
    parameters = [int(table[name][0].replace(",", "")) for name in ("OSDN", "DeltaNet")]
    assert parameters[0] - parameters[1] == 2 * 8 + 16 * 2 + 2  # d_0 and the gate of forgetting
    for name in ("OSDN", "DeltaNet", "gzip -9", "xz -9"):
        assert 0.5 < float(table[name][1]) < 8
    for name in ("OSDN", "DeltaNet"):
        assert float(table[name][2].replace(",", "")) > 0
    header = (configured / "runs" / "demo" / "loss.png").read_bytes()[:24]
    assert struct.unpack(">II", header[16:]) == (1200, 750)
    assert {path.name for path in (configured / "runs" / "demo").iterdir()} == {"osdn", "delta_net", "loss.png"}
    assert len(sample) == 300

    demo.main()  # a second time: everything is trained already
    out = capsys.readouterr().out
    assert out.count("going on from the checkpoint of step 40 of 40") == 2
    assert parts(out) == (table, sample)


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_CONFIG", tmp_path / "nothing.py")
    with pytest.raises(ConfigError, match="nothing.py is not there: the demo runs in a checkout"):
        demo.main()


def test_stopped_it_goes_on_where_it_was(configured, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo, "train", functools.partial(demo.train, stop_at=15))  # ends as at SIGTERM
        demo.main()
    assert capsys.readouterr().out.endswith("stopped after step 15 of OSDN; the same command goes on from there\n")
    demo.main()
    out = capsys.readouterr().out
    assert out.count("going on from the checkpoint of step 15 of 40") == 1
    assert len(parts(out)[1]) == 300


@pytest.fixture
def trained(configured, monkeypatch):
    """Return [(configuration, directory)] of the demo's trainings, each of which stops at once."""
    calls = []

    def train(config, workdir):
        calls.append((config, workdir))
        return Result(step=0, parameters=1, bits_per_byte=None, tokens_per_second=None)

    monkeypatch.setattr(demo, "train", train)
    return calls


def test_flags_say_where_and_how_long(trained, configured, monkeypatch):
    monkeypatch.setenv("HOME", str(configured))
    demo.main()
    demo.main(["--steps", "7", "--workdir", "~/mine", "--seed", "3"])
    (plain, plain_at), (config, at) = trained
    assert (plain.steps, plain.seed, plain.optimizer.warmup_steps, str(plain_at)) == (40, 0, 4, "runs/demo/osdn")
    assert (config.steps, config.seed, config.optimizer.warmup_steps, at) == (7, 3, 0, configured / "mine" / "osdn")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "0"], "--steps: got 0, expected at least 1"),
        (["--steps", "few"], "--steps: invalid int value: 'few'"),
        (["--seed", "-1"], "--seed: got -1, expected an integer from 0"),
        (["--seed", str(2**32)], f"--seed: got {2**32}, expected an integer from 0"),
        (["--workdir", ""], "--workdir: got '', expected a directory of this machine"),
        (["--workdir", "gs://bucket"], "--workdir: got 'gs://bucket', expected a directory of this machine"),
        (["--workdir", "file/demo"], "--workdir: got 'file/demo', but file is no directory"),
        (["--rule", "kda"], "unrecognized arguments: --rule kda"),
        (["300"], "unrecognized arguments: 300"),
    ],
)
def test_a_wrong_flag_is_one_line(trained, configured, capsys, flags, said):
    (configured / "file").touch()
    with pytest.raises(SystemExit) as end:
        demo.main(flags)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert (out, trained) == ("", [])
    assert err.startswith("python examples/demo.py: error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["runs", "runs/demo"])
def test_a_file_in_the_place_of_the_directory_is_one_line(trained, configured, capsys, name):
    (configured / name).parent.mkdir(exist_ok=True)
    (configured / name).touch()
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert (end.value.code, trained) == (2, [])
    err = capsys.readouterr().err
    assert err == f"python examples/demo.py: error: --workdir: got 'runs/demo', but {name} is no directory\n"


def test_a_run_of_other_settings_is_kept(configured, capsys):
    demo.main(["--steps", "1"])
    table, _ = parts(capsys.readouterr().out)
    assert table["OSDN"][2] == ""  # no speed: the only step includes compilation
    with pytest.raises(ConfigError, match="another configuration:\n  steps: 1 there, 2 now"):
        demo.main(["--steps", "2"])
    assert load_config(configured / "runs" / "demo" / "osdn").steps == 1
