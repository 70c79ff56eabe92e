"""The file that all stages add to."""

import json
import re

import pytest

from benchmarks.gpu import plan, record
from support.gpu_records import CALL, IDENTITY, finished, owed


def about(**changes):
    return {"identity": IDENTITY | changes, "call": CALL}


def test_stages_add_to_one_record(tmp_path):
    file = tmp_path / "gpu.json"
    first, second = finished(owed("smoke")[0]), finished(owed("check")[0])
    one = record.Record(about(), file)
    one.owe([plan.key_of(first), *owed("check")[:2]])
    one.add(first)
    again = record.Record(about(**{"fla-core": "0.6.0"}), file)
    assert [row["status"] for row in again.rows] == ["pass", plan.NOT_RUN, plan.NOT_RUN]
    assert {row["reason"] for row in again.rows[1:]} == {plan.NOT_REACHED}
    again.add({**second, "status": "hung", "reason": "no sign of life"})
    again.add({**plan.key_of(second), "status": plan.NOT_RUN, "reason": plan.OUT_OF_TIME})
    assert again.rows[1]["status"] == "hung"  # a later call that did not reach it does not overwrite it
    again.add(second)
    content = json.loads(file.read_text())
    assert content["identity"]["fla-core"] == "0.6.0"
    assert [(row["status"], row["call"], row.get("before")) for row in content["rows"]] == [
        ("pass", 0, None),
        ("pass", 1, ["hung"]),
        (plan.NOT_RUN, 0, None),
    ]
    assert "2 of 3" not in file.with_suffix(".md").read_text()
    assert file.with_suffix(".md").read_text().count("of 540 s") == 2
    other = record.Record(about(), tmp_path / "fresh" / "gpu.json", file)
    assert other.rows == content["rows"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "NVIDIA H200"}, "device NVIDIA H100 80GB HBM3 (here NVIDIA H200)"),
        ({"source": "0"}, "source 0123456789abcdef (here 0)"),
        ({"jax": "0.12.0", "torch": "2.12"}, "jax 0.11.2 (here 0.12.0), torch 2.11 (here 2.12)"),
    ],
)
def test_results_of_other_devices_sources_and_versions_are_not_mixed(tmp_path, changes, said):
    file = tmp_path / "gpu.json"
    record.Record(about(), file).write()
    before = file.read_text()
    with pytest.raises(record.Refused, match=re.escape(said)):
        record.Record(about(**changes), file)
    assert file.read_text() == before
    record.set_aside(file)
    assert (tmp_path / "gpu.1.json").read_text() == before
    record.Record(about(**changes), file).write()
    record.set_aside(file)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["gpu.1.json", "gpu.1.md", "gpu.2.json", "gpu.2.md"]


def test_the_sources_are_those_of_the_kernels(tmp_path, monkeypatch):
    (tmp_path / "pallas_kernels").mkdir()
    monkeypatch.setattr(record, "ROOT", tmp_path)
    seen = {record.source()}
    for name in ("pallas_kernels/a.py", "pallas_kernels/b.py", "pallas_kernels/notes.md"):
        (tmp_path / name).write_text("1")
        seen.add(record.source())
    assert len(seen) == 3
    assert record.commit() is None
