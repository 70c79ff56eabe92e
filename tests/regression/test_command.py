"""`python -m osdn_jax.regression`: files and figures of a small run, a rule of the user's own, and wrong flags."""

import json

import pytest

from osdn_jax.regression import BETAS, RULES, standard_conditions
from osdn_jax.regression.__main__ import main
from support.runs import ROOT

FLAGS = ["--quick", "--seeds", "2"]


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    """Every family, with the rules that the figures show and one control."""
    folder = tmp_path / "results"
    rules = "delta_net,osdn_paper,osdn_ones,pdn_2,matched_2,told_diagonal"
    assert main([*FLAGS, "--rules", rules, "--output", str(folder), "--images", str(tmp_path / "images")]) == 0
    record = json.loads((folder / "regression.json").read_text())
    assert len(record["rows"]) == 6 * len(record["conditions"])
    assert record["environment"]["command"].startswith("python -m osdn_jax.regression --quick")
    page = (folder / "regression.md").read_text()
    for family in ("Stationary", "Noisy", "Rotated", "Drifting", "Scale", "Repeated"):
        assert f"## {family}" in page
    assert (tmp_path / "images" / "regression-ratio.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "| `pdn_2` |" in said
    assert f"Written: {folder / 'regression.json'}" in said


def test_rule_of_the_user(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench_rule_of_mine.py").write_text("def half(k, beta):\n    return 0.5 * k\n")
    rule = "mine=bench_rule_of_mine:half"
    assert main([*FLAGS, "--only", "stationary", "--rules", "delta_net", "--add", rule]) == 0
    assert "| `mine` |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rules", "nothing"], "--rules: got 'nothing', expected some of delta_net"),
        (["--only", "stationary,nothing"], "--only: got 'nothing', expected some of stationary"),
        (["--seeds", "0"], "--seeds: got '0', expected an integer"),
        (["--add", "mine"], "--add: got 'mine', expected NAME=MODULE:FUNCTION"),
        (["--add", "delta_net=math:sin"], "--add: got 'delta_net', the name of a built-in rule"),
        (["--add", "mine=no_such_module:f"], "--add: got 'mine=no_such_module:f': No module named"),
        (["--add", "mine=math:nothing"], "--add: got 'mine=math:nothing': "),
        (["--add", "mine=math:sin"], "--add: got 'mine=math:sin': rules: mine: got a function of (x), expected"),
        (["--images", "folder"], "--images: got a folder, but --output is not given"),
        (["--output", "gs://bucket/x"], "--output: got 'gs://bucket/x', expected a directory"),
        (["--ruels", "x"], "--ruels: unknown argument; the flags are"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(flags)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"python -m osdn_jax.regression: error: {message}")
    assert said.count("\n") == 1


def test_rules_that_fail_end_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench_rule_that_fails.py").write_text("def half(k, beta):\n    return k[:, 1:]\n")
    rule = "mine=bench_rule_that_fails:half"
    assert main([*FLAGS, "--only", "stationary", "--rules", "delta_net", "--add", rule]) == 2
    assert "error: rules: mine: write_key: got a result of shape" in capsys.readouterr().err


def test_the_committed_results_are_of_these_rules_and_conditions():
    record = json.loads((ROOT / "benchmarks" / "results" / "regression.json").read_text())
    assert record["rules"] == {name: rule.about for name, rule in RULES.items()}
    named = [(c["family"], c["name"]) for c in record["conditions"]]
    assert named == [(c.family, c.name) for c in standard_conditions()]
    assert record["betas"] == list(BETAS)
    expected = sum(c.family in (rule.families or (c.family,)) for c in standard_conditions() for rule in RULES.values())
    assert len(record["rows"]) == expected
