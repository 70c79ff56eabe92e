"""The Markdown table of a record."""

import re

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import plan
from support.gpu_records import everything, finished, measured, owed, text


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
