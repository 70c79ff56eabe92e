"""`python -m benchmarks.ops`."""

import json

from benchmarks.ops import __main__ as benchmark

KEYS = {
    "command",
    "date",
    "device",
    "cpu",
    "cpu_cores",
    "jax",
    "jaxlib",
    "numpy",
    "python",
    "load_at_start",
    "load_at_end",
}


def test_the_benchmark_runs_and_keeps_what_it_does_not_measure(tmp_path, capsys):
    file = tmp_path / "ops-cpu.json"
    file.write_text(json.dumps({"auto": {"environment": dict.fromkeys(KEYS), "figures": [], "measurements": []}}))
    record = benchmark.main(["--quick", "--sections", "forward", "--out", str(tmp_path)])
    saved = json.loads(file.read_text())
    assert list(saved) == list(record) == ["auto", "forward"]
    assert set(saved["forward"]["environment"]) >= KEYS
    assert {r["implementation"] for r in saved["forward"]["measurements"]} == {"scan", "chunk"}
    assert len(saved["forward"]["figures"]) == 6
    row = "| decay channel, forward: largest time of None / better of scan and chunks |"
    assert row in capsys.readouterr().out
    assert row in (tmp_path / "ops-cpu.md").read_text()
