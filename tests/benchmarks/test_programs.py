"""Exported programs in the GPU suite: the calls that they are needed for, and what the record says of them."""

import importlib.util
import json
import re

import jax
import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import cases, choice, plan, programs
from osdn_jax.compare import parse_shapes
from triton_kernels import exported
from triton_kernels.common import installation, target

CALL = {
    "operator": "gram",
    "gradient": False,
    "arrays": {name: {"shape": [1, 8, 1, 32], "dtype": "float32"} for name in ("k", "log_decay", "gain")},
    "options": {"squash": 1.0, "return_write_key": False},
}


def listed(tmp_path, capsys, *arguments):
    """Return the calls that a call of the suite lists."""
    file = tmp_path / "calls.json"
    assert gpu_suite.main(["--list-calls", str(file), *arguments]) == 0
    calls = [exported.Call.of_data(entry) for entry in json.loads(file.read_text())]
    assert capsys.readouterr().out.startswith(f"{len(calls)} calls in {file}: python -m triton_kernels.export --calls ")
    return calls


def folder(tmp_path, **changes):
    tmp_path.mkdir(exist_ok=True)
    index = {"format": exported.FORMAT, "capability": 89, "versions": {"jax": jax.__version__, "triton": "3.9.0"}}
    index |= {"chunk_sizes": {}, "programs": [{"file": "one", **CALL}]}
    (tmp_path / exported.INDEX).write_text(json.dumps(index | changes))
    (tmp_path / "one").write_bytes(b"a program")
    return tmp_path


def test_the_calls_of_a_check_are_listed_with_their_gradients(tmp_path, capsys):
    calls = listed(tmp_path, capsys, "--stage", "smoke", "--cases", "*decay, [fg]*")
    assert [(call.operator, call.gradient) for call in calls] == [("delta_rule", False), ("delta_rule", True)] * 3
    assert {call.shapes()["q"].shape for call in calls} == {(1, 128, 4, 128)}
    decays = [{name for name, *_ in call.arrays} & {"log_decay"} for call in calls[::2]]
    assert decays == [set(), {"log_decay"}, {"log_decay"}]
    # The kernels take head dimensions of 32, 64, 128 and 256; the operator pads the others.
    (padded,) = {
        call.shapes()["v"].shape[-1] for call in listed(tmp_path, capsys, "--stage", "check", "--cases", "*K 48 V 96")
    }
    assert padded == 128


def test_the_calls_of_a_timed_rule_are_those_of_its_operators_at_every_shape(tmp_path, capsys):
    calls = listed(tmp_path, capsys, "--stage", "ours", "--rules", "pgdn")
    assert {call.operator for call in calls} == {"delta_rule", "gram"}
    sizes = {(s.batch, s.length) for text in plan.SHAPES for s in parse_shapes(text)}
    for operator in ("delta_rule", "gram"):
        for gradient in (False, True):
            some = [call for call in calls if (call.operator, call.gradient) == (operator, gradient)]
            assert {call.shapes()["k"].shape[:2] for call in some} == sizes
            assert {str(call.shapes()["k"].dtype) for call in some} == {"bfloat16"}


def test_a_list_of_calls_leaves_the_operators_as_they_were(tmp_path, capsys):
    listed(tmp_path, capsys, "--stage", "smoke", "--cases", "Gram, forward")
    case = cases.SMOKE["Gram, forward"]
    with pytest.raises(NotImplementedError, match="'triton': got a cpu"):
        jax.eval_shape(lambda x: cases.outputs(case, x, None, "triton"), cases.draw(case, "random", 0)[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--list-calls", "none/calls.json"], "--list-calls: got 'none/calls.json', but there is no folder 'none'"),
        (["--list-calls", "calls.json", "--stage", "peers"], "--list-calls: name one of the stages smoke, check, ours"),
        (["--list-calls", "calls.json", "--cases", "none*"], "--cases: no case matches 'none*'"),
        (["--dry", "--programs", "x"], "--programs: for triton on a GPU, here it is mosaic_gpu_interpret"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert gpu_suite.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpu_suite: {said}")
    assert error.count("\n") == 1


def test_programs_are_described_by_their_content_and_versions(tmp_path):
    said = programs.described(folder(tmp_path / "a"), 89)
    assert re.fullmatch(rf"1 programs, [0-9a-f]{{12}}, by jax {re.escape(jax.__version__)}, triton 3\.9\.0", said)
    other = folder(tmp_path / "b")
    assert programs.described(other, 89) == said
    (other / "one").write_bytes(b"another")
    assert programs.described(other, 89) != said
    with pytest.raises(ValueError, match=r"for compute capability 8\.9; this GPU has 8\.0"):
        programs.described(other, 80)
    (other / "one").unlink()
    with pytest.raises(ValueError, match="whose one cannot be read: No such file"):
        programs.described(other, 89)


@pytest.fixture
def a_gpu(monkeypatch):
    """Let the suite take this machine for one with an RTX 4090 and an old Triton."""
    about = dict.fromkeys(("cpu", "cpu_cores", "numpy", "osdn_jax", "jax", "jaxlib", "python"))
    about |= {"date": "2026-01-01", "device": "NVIDIA GeForce RTX 4090", "platform": "gpu"}
    monkeypatch.setattr(gpu_suite, "environment", lambda command: {**about, "command": command})
    monkeypatch.setattr(gpu_suite, "capability_of", lambda device: 89)
    monkeypatch.setattr(target, "limitation", lambda: None)
    monkeypatch.setattr(installation, "missing", lambda *, interpret: None)
    monkeypatch.setattr(choice, "_too_old", lambda: "got Triton 3.6.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "flatbuffers")


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_record_says_that_its_kernels_were_exported(tmp_path, a_gpu, monkeypatch, capsys, by_variable):
    given = folder(tmp_path / "programs")
    call = ["--budget", "0", "--stage", "smoke", "--out", str(tmp_path)]
    assert gpu_suite.main(call) == 2
    assert capsys.readouterr().err == "gpu_suite: --implementation triton: got Triton 3.6.0\n"
    if by_variable:
        monkeypatch.setenv(exported.VARIABLE, str(given))
    assert gpu_suite.main(call if by_variable else [*call, "--programs", str(given)]) == 1
    record = json.loads((tmp_path / "gpu-nvidia-geforce-rtx-4090-triton.json").read_text())
    assert record["identity"]["implementation"] == "triton"
    assert record["identity"]["programs"].startswith("1 programs, ")
    assert "The Triton kernels were exported on another machine: 1 programs, " in capsys.readouterr().out


def test_programs_that_cannot_be_read_are_refused(tmp_path, a_gpu, capsys):
    for given, said in (
        (tmp_path / "none", "cannot read "),
        (folder(tmp_path / "old", format=0), "cannot read "),
        (
            folder(tmp_path / "other", capability=80),
            f"got {tmp_path / 'other'}, for compute capability 8.0; this GPU has",
        ),
    ):
        assert gpu_suite.main(["--budget", "0", "--out", str(tmp_path), "--programs", str(given)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"gpu_suite: --programs: {said}")
        assert error.count("\n") == 1


def test_what_reads_programs_may_be_missing(tmp_path, a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    call = ["--budget", "0", "--out", str(tmp_path), "--programs", str(folder(tmp_path / "programs"))]
    assert gpu_suite.main(call) == 2
    said = "--implementation triton: exported programs need flatbuffers to be read: pip install flatbuffers"
    assert capsys.readouterr().err == f"gpu_suite: {said}\n"
