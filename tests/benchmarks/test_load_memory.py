"""The benchmark of loading: its checkpoint can be loaded, and each case reports its memory."""

import json

import pytest

from benchmarks import load_memory
from osdn_jax import interop
from support.pretrained import config_of


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_the_checkpoint_and_its_cases(family, tmp_path, monkeypatch):
    monkeypatch.setattr(load_memory, "_SHARD", 3000)
    config = config_of(family, dtype="bfloat16")
    parameters, size = load_memory.write_checkpoint(tmp_path, config)
    found = interop.inspect(tmp_path)
    assert found.problems == []
    assert f"  parameters {parameters:,}" in found.lines
    assert size == 2 * parameters
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for case in ("nothing", "as stored", "float32"):
        row = load_memory._load(str(tmp_path), case)
        assert row["case"] == case
        assert row["peak_bytes"] > 10**8  # Python with JAX


@pytest.mark.parametrize("arguments", [["--layers", "x"], ["--nothing"]])
def test_wrong_command_lines(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["load_memory", *arguments])
    with pytest.raises(SystemExit) as end:
        load_memory.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["load-memory", "load-memory-experts"])
def test_the_recorded_result_is_within_its_promise(name):
    path = load_memory.__file__.replace("load_memory.py", f"results/{name}.json")
    with open(path) as file:
        recorded = json.load(file)
    assert recorded["parameters"] > 1.2e9
    assert max(case["peak_bytes"] for case in recorded["cases"]) < 8e9
