"""The Markdown table of a record."""

import re

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import plan
from support.gpu_records import IDENTITY, everything, finished, measured, owed, text


@pytest.mark.parametrize("sections", [("smoke", "check"), ("time", "ceilings", "compile")])
def test_the_table_of_a_call_fits_the_end_of_a_log(sections):
    rows = [finished(key) for key in everything()]
    table = text(rows, *sections)
    assert len(table) < 12_000
    assert "H100" in table
    assert "fla-core not installed" in table
    assert "## Not measured" not in table
    assert gpu_suite.status(rows) == 0
    if "time" in sections:
        assert "| kda f+b | 1.000 | 10.0% |" in table
    else:
        assert "| channel decay, D 256 | d_initial_state 1.0e-03 of 1e-02 | d_initial_state 1.0e-03 of 1e-02 |" in table


def test_the_table_names_what_is_not_measured():
    keys = [key for stage in ("ours", "peers") for key in owed(stage)]
    rows = [finished(key) for key in keys if key.get("contender") != "peer"]
    missing = plan.missing_rows(keys, rows, "missing", "No module named 'fla'")
    table = text(sorted(rows + missing, key=plan.place))
    assert len(table) < 12_000
    assert "missing: B1T8192H64D128 delta_net forward peer and 49 more: No module named 'fla'" in table
    assert gpu_suite.status(rows + missing) == 0


def test_the_table_shows_differences_and_earlier_failures():
    key = {"section": "time", "shape": plan.SHAPES[0], "rule": "kda", "program": plan.BOTH}
    ours = measured({**key, "contender": "ours"}, difference=0.05, differences={"o": 0.001, "d_beta": 0.05})
    peer = measured({**key, "contender": "peer"}, ours_seconds=5e-4)
    late = {**finished(owed("check")[0]), "before": ["hung"]}
    table = text([late, ours, peer])
    assert "B1T8192H64D128 kda f+b ours: d_beta 5.0e-02" in table
    assert re.search(r"\| kda f\+b \| 1\.000≠ .*\| 1\.000 \| 2\.00 \|", table)
    assert "of 1e-02, before: hung" in table


def test_another_implementation_is_a_column():
    key = {"section": "time", "shape": plan.SHAPES[0], "rule": "kda", "program": plan.BOTH}
    rows = [measured({**key, "contender": "ours"}), measured({**key, "contender": "triton"}, ours_seconds=2e-3)]
    rows += [measured({**key, "contender": "xla"}, ours_seconds=5e-4)]
    table = text(rows)
    head, rule, _, _, line = next(table.split("\n")[i : i + 5] for i, x in enumerate(table.split("\n")) if " ± " in x)
    assert head == "| | mosaic_gpu ms | ± | ns | mem | flop | triton ms | /ours | FLA ms | /ours | XLA ms | /ours |"
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| kda f | ") or "| 1.000 | 0.50 |  |  | 1.000 | 2.00 |" in line
    assert "| 1.000 | 0.50 |  |  | 1.000 | 2.00 |" in table
    places = [plan.place(row) for row in rows]
    assert places == sorted(places)


def test_bounds_are_those_of_the_data_sheet_until_the_device_is_measured():
    keys = owed("ours")
    times = [finished(key) for key in keys if key["section"] == "time"]
    late = {"section": "ceilings", "status": plan.NOT_RUN, "reason": plan.OUT_OF_TIME}
    told = "Ceilings of the data sheet: 1.01 TB/s, 165 TFLOP/s; those of this device: out of time."
    assert told in text([late, *times], device="NVIDIA GeForce RTX 4090")
    # 1e9 bytes at 1.008 TB/s and 1e11 operations at 165.2 TFLOP/s, of 1 ms
    assert "| 99% | 61% |" in text([late, *times], device="NVIDIA GeForce RTX 4090")
    assert "No ceilings: out of time." in text([late, *times], device="NVIDIA GeForce RTX 9090")
    measured_here = text([finished(key) for key in keys], device="NVIDIA L4")
    assert "copy 4.00 TB/s, matmul 800 TFLOP/s; the data sheet says 0.30 TB/s, 121 TFLOP/s." in measured_here


def test_the_table_says_what_was_not_a_gpu_or_not_compiled_here():
    rows = [finished(key) for key in owed("smoke")]
    assert "Dry run" not in text(rows)
    assert "It says nothing about a GPU." in text(rows, dry=True)
    assert IDENTITY["dry"] is False
