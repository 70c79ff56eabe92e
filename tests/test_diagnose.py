"""Diagnostics of a run: the command line, its files, and errors in one line."""

import json
import re
import shutil
import sys

import matplotlib.image
import numpy as np
import pytest

from osdn_jax.diagnose import __main__ as module
from osdn_jax.diagnose import diagnose_run, figures, report, save
from osdn_jax.diagnose.run import RunDiagnostics
from support.runs import finished

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run():
    return finished()[0]


@pytest.fixture(scope="module")
def diagnosed(run):
    return diagnose_run(run, windows=2, bins=8, hindsight_steps=4)


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setitem(sys.modules, "__main__", module)  # errors begin with the program's name
        monkeypatch.setattr(sys, "argv", ["diagnose", *map(str, arguments)])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_the_identity_holds_in_a_trained_model(diagnosed):
    """e' = (1 - beta <w, k>) e, both residuals read from the state."""
    for layer in diagnosed.found.layers:
        assert 0 < layer.identity_error < 1e-5
        actual = layer.writes["actual"]
        assert np.all(actual.loss_after < actual.loss_before)


def test_what_is_said_about_a_run(run, diagnosed):
    about = diagnosed.about
    assert about["run"] == str(run)
    assert (about["rule"], about["step"], about["windows"], about["length"]) == ("osdn", 40, 2, 48)
    assert about["bounds"] == (0.0, 1e9)
    assert 0 < about["valid_tokens"] <= 96
    assert about["valid_tokens"] == diagnosed.found.tokens


def test_a_window_is_as_long_as_asked_for(run):
    diagnosed = diagnose_run(run, windows=1, length=20, hindsight_steps=0)
    assert diagnosed.about["length"] == 20
    assert len(diagnosed.found.positions) == 20  # of 64 bins


def test_the_command_writes_tables_numbers_and_figures(tmp_path, run, command):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    status, out, err = command(
        "--workdir", run, "--windows", 2, "--bins", 8, "--hindsight_steps", 3, "--output", tmp_path / "new" / "folder"
    )
    assert (status, err) == (0, "")
    assert "layer 1 of 1" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    folder = tmp_path / "new" / "folder"
    pictures = {f"{name}.png" for name in figures.FIGURES}
    assert {path.name for path in folder.iterdir()} == {"diagnostics.md", "diagnostics.json", *pictures}
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    found = json.loads((folder / "diagnostics.json").read_text())
    assert found["about"]["hindsight_steps"] == 3
    layer = found["layers"][0]
    heads = found["about"]["heads"]
    assert np.shape(layer["writes"]["actual"]["loss_before_by_position"]) == (heads, 8)
    assert np.shape(layer["multipliers"]["by_position"]) == (heads, 4, 8)
    assert np.shape(layer["best_multipliers"]) == (heads, found["about"]["key_dim"])
    for quantity in ("loss_before", "loss_after", "factor", "step"):
        mean = np.mean(layer["writes"]["actual"][quantity])
        assert found["all_layers"]["actual"][quantity] == pytest.approx(mean, rel=1e-4)

    page = (folder / "diagnostics.md").read_text()
    rows = re.findall(r"^\| (actual|d = 1|mean\(d\)|matched step|best fixed [cd]) \| (.*) \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == 2 * [
        "actual",
        "d = 1",
        "mean(d)",
        "matched step",
        "best fixed c",
        "best fixed d",
    ]
    shown = float(rows[0][1].split(" | ")[1])
    assert shown == pytest.approx(found["all_layers"]["actual"]["loss_before"], rel=5e-3)
    assert rows[5][1].endswith("| 0 | 0 %")
    assert f"| {rows[0][1]} |" in out


def test_files_lie_in_the_run_by_default(tmp_path, run, command, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {})
    copy = shutil.copytree(run, tmp_path / "run")
    assert command("--workdir", copy, "--windows", 1, "--hindsight_steps", 0)[0] == 0
    assert (copy / "diagnostics" / "diagnostics.md").is_file()
    assert "regret" not in (copy / "diagnostics" / "diagnostics.md").read_text().split("##")[0]


def test_numbers_that_do_not_exist_are_null_and_dashes(diagnosed):
    layer = diagnosed.found.layers[0]
    writes = layer.writes["actual"]._replace(ratio_by_position=np.array([[np.nan, 0.5]]), loss_after=np.array([np.inf]))
    without = {"actual": writes}
    found = diagnosed.found._replace(
        layers=(
            layer._replace(
                writes=without, best_multipliers=None, multipliers=layer.multipliers._replace(share_on_bound=None)
            ),
        )
    )
    recorded = report.record(found, diagnosed.about)
    json.dumps(recorded, allow_nan=False)
    assert recorded["layers"][0]["writes"]["actual"]["ratio_by_position"] == [[None, 0.5]]
    assert recorded["layers"][0]["regret"] == {"actual": None}
    (row,) = report.table(found.layers)[2:]
    assert row.endswith("| – | – | – |")


def test_a_deep_model_has_a_panel_for_each_layer(tmp_path, diagnosed, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"key_spectrum": figures.key_spectrum})
    found = diagnosed.found._replace(layers=diagnosed.found.layers * 5)
    page, _, picture = save(RunDiagnostics(found, diagnosed.about | {"layers": 5}), tmp_path)
    assert page.read_text().count("## Layer") == 5
    height, width = matplotlib.image.imread(picture).shape[:2]
    assert width > height > 800  # four panels and, below, the fifth


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--windows", 0], "windows: got 0, expected an int of at least 1"),
        (["--windows", 10**6], "windows: got 1000000, expected at most"),
        (["--windows", "many"], "--windows: invalid int value: 'many'"),
        (["--length", 0], "length: got 0, expected an int of at least 1"),
        (["--bins", 0], "bins: got 0, expected an int of at least 1"),
        (["--hindsight_steps", -1], "hindsight_steps: got -1, expected at least 0"),
        (["--output", ""], "--output: got '', expected a directory of this machine"),
        (["--window", 1], "unrecognized arguments: --window 1"),
    ],
)
def test_a_wrong_flag_is_one_line(run, command, arguments, said):
    status, _, err = command("--workdir", run, *arguments)
    assert status == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path, run, command):
    (tmp_path / "file").write_text("")
    status, _, err = command("--workdir", run, "--output", tmp_path / "file")
    assert status == 2
    assert err.count("\n") == 1
    assert "--output: got" in err


def test_a_directory_without_a_run_is_one_line(tmp_path, run, command):
    status, _, err = command("--workdir", tmp_path / "nothing")
    assert (status, err.count("\n")) == (2, 1)
    assert "nothing/config.json does not exist: is this the working directory of a run?" in err
    (tmp_path / "started").mkdir()
    shutil.copy(run / "config.json", tmp_path / "started")
    status, _, err = command("--workdir", tmp_path / "started")
    assert (status, err.count("\n")) == (2, 1)
    assert "no folder of checkpoints" in err


@pytest.mark.parametrize("rule", ["transformer", "gla"])
def test_a_run_without_a_delta_rule_is_one_line(tmp_path, run, command, rule):
    """It is said before the data or a checkpoint are read."""
    config = json.loads((run / "config.json").read_text())
    config["model"]["rule"] = rule
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = command("--workdir", tmp_path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.match(r"python -m osdn_jax.diagnose: error: model: got .*, expected a delta rule: ", err)
