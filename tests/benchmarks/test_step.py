"""`python -m benchmarks.step`."""

import json

from benchmarks import step as benchmark


def test_the_benchmark_runs(tmp_path, capsys):
    options = ["--quick", "--rules", "osdn", "--against", str(benchmark.ROOT), "--out", str(tmp_path)]
    record = benchmark.main(options)
    assert json.loads((tmp_path / "step-cpu.json").read_text()) == record
    found = record["rules"]["osdn"]
    here, there = (found["checkouts"][name] for name in ("this one", benchmark.ROOT.name))
    assert here["loss"] == there["loss"]
    assert here["tokens"] == 32
    assert set(found["parts"]) == set(benchmark.PARTS)
    assert "| delta rule, preconditioner |" in capsys.readouterr().out
    assert "| this one |" in (tmp_path / "step-cpu.md").read_text()
