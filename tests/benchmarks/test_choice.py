"""The implementation that the GPU suite picks, and what a machine may lack for it."""

import importlib.metadata
import importlib.util

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import choice, plan
from benchmarks.gpu.jobs import worker_environment
from osdn_jax.ops import selection
from support.gpu_records import finished, owed
from triton_kernels.common import installation, target


@pytest.mark.parametrize(
    ("named", "dry", "hopper", "picked"),
    [
        (None, False, True, "mosaic_gpu"),
        (None, False, False, "triton"),
        (None, True, False, "mosaic_gpu_interpret"),
        ("triton", False, True, "triton"),
        ("triton", True, False, "triton_interpret"),
        ("triton_interpret", True, False, "triton_interpret"),
        ("mosaic_gpu", True, True, "mosaic_gpu_interpret"),
        ("chunk", True, False, "chunk"),
    ],
)
def test_the_kernels_are_those_of_the_gpu(monkeypatch, named, dry, hopper, picked):
    monkeypatch.setattr(selection, "on_hopper", lambda: hopper)
    assert choice.implementation(named, dry) == picked


@pytest.mark.parametrize(
    ("card", "missing", "version", "said"),
    [
        ("got a Tesla T4 of compute capability 7.5", None, "3.9.0", "got a Tesla T4"),
        (None, "needs jax-triton: pip install", "3.9.0", "needs jax-triton"),
        (None, None, "3.6.1", "got Triton 3.6.1, jax-triton needs 3.7 or later"),
        (None, None, "3.7.0", None),
        (None, None, "3.10.0+git", None),
    ],
)
def test_what_a_machine_lacks_for_triton(monkeypatch, card, missing, version, said):
    monkeypatch.setattr(target, "limitation", lambda: card)
    monkeypatch.setattr(installation, "missing", lambda *, interpret: missing)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found = choice.absent("triton")
    assert (found is None) if said is None else found.startswith(said)
    assert choice.absent("mosaic_gpu") is None


def test_the_interpreter_needs_triton_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choice.absent("triton_interpret").startswith("needs triton: pip install")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton")
    assert choice.absent("triton_interpret") is None


def test_the_interpreters_variable_is_set_for_its_processes_alone():
    assert installation.VARIABLE not in worker_environment({}, True, ("chunk", "mosaic_gpu_interpret"))
    assert worker_environment({}, True, ("chunk", "triton_interpret"))[installation.VARIABLE] == "1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--implementation", "triton"], "--implementation triton_interpret: needs triton"),
        (["--also", "triton"], "--also triton_interpret: needs triton"),
        (["--also", "mosaic_gpu"], "--also: got mosaic_gpu_interpret, which is timed anyway"),
        (["--also", "chunk"], "--also: got chunk, which is timed anyway"),
        (["--cases", "*float32*"], "--cases: no case matches '*float32*'"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_one_line(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(choice, "absent", lambda name, _: "needs triton" if "triton" in name else None)
    assert gpu_suite.main(["--dry", "--budget", "0", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpu_suite: {said}")
    assert error.count("\n") == 1


def test_each_kind_of_kernels_has_a_file_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choice, "absent", lambda name, exported: None)
    for name in ("mosaic_gpu", "triton"):
        gpu_suite.main(["--dry", "--budget", "0", "--stage", "check", "--implementation", name, "--out", str(tmp_path)])
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["gpu-dry-triton.json", "gpu-dry.json"]
    assert "scalar decay, float32, tiny" in (tmp_path / "gpu-dry-triton.md").read_text()


def test_other_implementations_are_timed_in_the_same_rounds_and_must_run():
    request = plan.Request("mosaic_gpu", dry=False, rules=("kda",), also=("triton",))
    keys = [key for key in owed("ours", request=request) if key["section"] == "time"]
    assert [key["contender"] for key in keys[:3]] == ["ours", "triton", "xla"]
    assert len(keys) == 3 * 2 * len(plan.SHAPES)
    rows = [finished(key) for key in keys]
    assert gpu_suite.status(rows) == 0
    next(row for row in rows if row["contender"] == "triton")["status"] = "raised"
    assert gpu_suite.status(rows) == 1
