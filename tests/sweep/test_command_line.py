"""`python -m osdn_jax.sweep`: whole sweeps in processes, and one line for what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import ClassVar

import pytest

import osdn_jax.sweep.__main__ as cli
from osdn_jax.sweep import read_results
from osdn_jax.sweep.claims import Claims
from osdn_jax.sweep.worker import Worker
from support.runs import ROOT

CONFIG = """
from osdn_jax.training import default_config
VARIANTS = {"beta2": "delta_net model.negative_eigenvalues=true"}
def get_config(arg=None):
    config = default_config()
    config.data.task = "mqar:length=16,pairs=2,vocabulary=32"
    config.data.validation_examples = 8
    config.model.layers, config.model.width, config.model.heads, config.model.mlp_dim = 1, 8, 1, 8
    config.batch_size, config.steps, config.validation.every = 4, 6, 3
    config.optimizer.warmup_steps = 2
    return config
"""


@pytest.fixture
def line(tmp_path):
    """The arguments of a sweep of two variants with two seeds."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    names = ["--rules", "delta_net,beta2", "--seeds", "2", "--output", str(tmp_path / "out")]
    return [str(tmp_path / "tiny.py"), *names]


def wait_for(condition):
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children(process):
    """The processes that a process has started, on Linux."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    )
    return [int(number) for number in found.stdout.split()]


@pytest.mark.slow
def test_a_sweep_is_killed_interrupted_and_finished(line, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    plan = cli._plan(cli._parse(line))
    held = plan.runs({})[-1]
    records = lambda: read_results(out).records
    messages = tmp_path / "messages.txt"
    command = [sys.executable, "-m", "osdn_jax.sweep", *line, "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    with Claims(out) as claims, messages.open("w") as file:
        assert claims.take(held.key)  # so that one run is left
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits it if the tests ignore it
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=file, stderr=file)
        signal.signal(signal.SIGINT, before)
        wait_for(lambda: len(records()) == 3 or process.poll() is not None)
        os.kill(children(process)[0], signal.SIGKILL)
        wait_for(lambda: "killed by SIGKILL" in messages.read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
        assert children(process) == []
    text = messages.read_text()
    assert "a process was killed by SIGKILL; another one continues with its run" in text
    assert text.count("interrupted: 3 of 4 runs have finished; the same command continues from there") == 1
    assert "Traceback" not in text
    assert "1 of 4 runs have not finished." in (out / "table.md").read_text()

    with (out / "results.jsonl").open("a") as torn:
        torn.write('{"key": "')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert cli.main([*line, "--jobs", "1"]) == 0
    said = capfd.readouterr()
    assert "results.jsonl, line 4 is not the record of a run" in said.err
    assert "3 of 4 runs have finished; 1 process" in said.out
    assert "4 of 4 runs" in said.out
    assert [r["key"] for r in records()[3:]] == [held.key]
    assert {(r["label"], r["seed"]) for r in records()} == {(v, s) for v in ("delta_net", "beta2") for s in (0, 1)}
    assert all(r["steps"] == [0, 3, 6] and r["cpu_seconds"] > 0 for r in records())
    assert (out / "sweep.png").exists()
    for label in ("delta_net", "beta2"):
        assert re.search(rf"^\| {label} \| 0\.003 \| 2 \|", said.out, re.MULTILINE)

    before = (out / "results.jsonl").read_bytes()  # nothing is left to train
    assert cli.main(line) == 0
    assert (out / "results.jsonl").read_bytes() == before


class FakeTrainer:
    """Learns at 1e-2 from half the steps on, and not at other rates."""

    made: ClassVar[list] = []

    def __init__(self, config, members=None):
        self.config = config
        self.made.append((config.model.negative_eigenvalues, members))

    def train(self, seeds, rate, on_steps=lambda steps: None):
        from osdn_jax.sweep import Curve

        on_steps(6)
        level = 0.9 if rate == 1e-2 else 0.1
        return [Curve([0, 3, 6], [0.0, level, level], [3.0, 2.0, 1.0], [None, 2.0, 1.0], 0, False) for _ in seeds]


@pytest.fixture
def work(line, tmp_path, monkeypatch):
    """Run a worker in this process, with a trainer that trains nothing; return the messages."""
    monkeypatch.setattr("osdn_jax.sweep.worker.Trainer", FakeTrainer)
    monkeypatch.setattr(FakeTrainer, "made", [])

    def run(*flags):
        given = cli._parse([*line, *flags])
        plan, folder, messages = cli._plan(given), cli._folder(given), []
        Worker(plan, folder, messages.append, {"device": "cpu", "cpu": "", "jax": ""}).run()
        return plan, read_results(folder).records, json.loads(json.dumps(messages))

    return run


def test_choose_is_one_command(work, line, capsys):
    plan, records, messages = work("--learning_rates", "1e-3,1e-2,3e-3", "--choose", "--seeds", "3")
    assert [(r["label"], r["learning_rate"], r["seed"]) for r in records] == [
        (label, *run)
        for label in ("delta_net", "beta2")
        for run in ((1e-3, 0), (1e-2, 0), (3e-3, 0), (1e-2, 1), (1e-2, 2))
    ]
    assert FakeTrainer.made == [(False, None), (True, None)]  # one program for each variant
    assert sum(len(m.get("finished", [])) for m in messages) == plan.total == 10
    assert cli.main([*line, "--learning_rates", "1e-3,1e-2,3e-3", "--choose", "--seeds", "3"]) == 0
    said = capsys.readouterr().out
    assert "| delta_net | 0.01 | 3 | 90.0 | 0.0 | 90.0 to 90.0 | 3 (3 to 3) | 3 of 3 |" in said
    assert "| beta2 | 10.0 | 90.0 | 10.0 |" in said


def test_more_seeds_train_only_what_is_missing(work):
    assert len(work()[1]) == 4
    assert len(work("--seeds", "3")[1]) == 6
    assert len(work("--seeds", "1", "--learning_rates", "5e-3")[1]) == 8
    _, records, _ = work("--seeds", "1", "--set", "steps=9")
    assert [r["settings"]["steps"] for r in records] == [6] * 8 + [9] * 2


def test_vmap_trains_the_missing_seeds_together(work):
    work("--seeds", "1")
    FakeTrainer.made.clear()
    _, records, _ = work("--seeds", "3", "--vmap")
    assert FakeTrainer.made == [(False, 2), (True, 2)]
    assert [r["trained_together"] for r in records] == [1] * 2 + [2] * 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rules", "ozdn"], "error: --rules: got 'ozdn', expected some of beta2, delta_net"),
        (["--set", "model.widht=3"], "error: --set: there is no key 'model.widht' (did you mean model.width"),
        (["--set", "steps=7"], "error: delta_net: steps: got 7, expected a multiple of validation.every = 3"),
        (["--set", "data.task=mqar:pairs=90"], "error: delta_net: data.task: mqar: pairs: got 90"),
        (["--set", "data.task=None"], "error: delta_net: data.task: got None, expected a recall task"),
        (["--learning_rates", "1e-3,fast"], "error: --learning_rates: got 'fast', expected positive numbers"),
        (["--learning_rates", "-1"], "error: --learning_rates: got '-1', expected positive numbers"),
        (["--learning_rates", "1e-46"], "error: delta_net: optimizer.learning_rate: got 1e-46"),
        (["--seeds", "0"], "error: --seeds: got '0', expected an integer from 1"),
        (["--jobs", "x"], "error: --jobs: got 'x', expected an integer from 1"),
        (["--threshold", "2"], "error: --threshold: got '2', expected an accuracy"),
        (["--variant", "a: osdn model.preset=paper2"], "paper2"),
        (["--variant", "a: delta_net model.eta=1"], "error: a: model.eta: got 1.0"),
        (["--output", "gs://bucket/run"], "error: --output: got 'gs://bucket/run', expected a directory"),
        (["--output", "/dev/null"], "/dev/null"),
        (["--rule", "osdn"], "error: unrecognized arguments: --rule osdn"),
    ],
)
def test_wrong_flags_end_in_one_line(line, capsys, flags, said):
    try:
        status = cli.main([*line, *flags])
    except SystemExit as end:
        status = end.code
    assert status == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert err.startswith("python -m osdn_jax.sweep: error: ")
    assert out == ""


def test_a_missing_file_ends_in_one_line(tmp_path, capsys):
    assert cli.main([str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("arg", ["", ":length=96,pairs=12,reads=2,width=16,heads=1,seed=3,steps=200"])
def test_the_configuration_in_the_repository(arg):
    rules = ",".join(["delta_net", "pdn", "gated_delta_net", *declared()])
    plan = cli._plan(cli._parse([f"{ROOT}/configs/mqar.py{arg}", "--rules", rules, "--seeds", "5"]))
    assert len(plan.runs({})) == 5 * len(plan.variants)
    assert plan.seeds[0] == (3 if arg else 0)


def declared():
    from configs.mqar import VARIANTS

    return VARIANTS
