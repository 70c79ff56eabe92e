"""The benchmark of generation runs, and its pages have what they promise."""

import pytest

from benchmarks import generation

pytestmark = pytest.mark.slow


def test_the_quick_benchmark_writes_both_pages(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "MODELS", {"delta": (generation._DELTA,), "attention": (generation._ATTENTION,)})
    generation.main(["--quick", "--out", str(tmp_path)])
    speed = (tmp_path / "generation-cpu.md").read_text()
    assert all(name in speed for name in ("| delta |", "| attention |", "batch 2", "position 1,000"))
    rows = [line for line in (tmp_path / "generation-bfloat16.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == 2
    errors = [float(row.split("|")[2].split(",")[0]) for row in rows]
    assert all(1e-5 < error < 0.1 for error in errors)
    assert capsys.readouterr().out
