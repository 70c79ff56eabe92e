"""Jobs as processes that raise, die or hang."""

import os
import re

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import plan, room
from benchmarks.gpu.jobs import Clock, Patience, Runner, worker_environment
from support.gpu_records import REQUEST


def run_jobs(tmp_path, jobs, budget=100.0, patience=100.0):
    rows = []
    runner = Runner(Clock(budget), tmp_path, 2, worker_environment(os.environ, True), rows.append)
    runner.run(jobs, Patience(patience, patience, starting=patience), timed=False)
    return rows


def test_a_kernel_that_raises_and_a_process_that_dies_end_nothing(tmp_path):
    request = plan.Request("mosaic_gpu", dry=True, cases="scalar decay, tiny")
    (job,) = plan.plan_stage("check", [], request).jobs
    dead = {"section": "check", "case": "none", "keys": "random"}
    jobs = [plan.Job({**job.spec, "case": "none"}, (dead,)), job]
    rows = {(row["case"], row["keys"]): row for row in run_jobs(tmp_path, jobs)}
    assert rows["none", "random"]["status"] == "died"
    assert rows["none", "random"]["reason"] == "exit status 1: KeyError: 'none'"
    for key in job.owed:
        row = rows[key["case"], key["keys"]]
        assert row["status"] == "raised"
        assert re.match("NotImplementedError: .*need a GPU", row["reason"])
    assert gpu_suite.status(list(rows.values())) == 1


def test_a_process_that_hangs_is_ended(tmp_path):
    job = plan.plan_stage("ours", [], REQUEST).jobs[1]
    rows = run_jobs(tmp_path, [job], patience=0.0)
    assert [row["status"] for row in rows] == ["hung"] * len(job.owed)


@pytest.mark.parametrize(
    ("device", "together", "waiting"),
    [
        ("NVIDIA GeForce RTX 4090", 8, 23),
        ("NVIDIA A100-SXM4-40GB", 13, 50),
        ("NVIDIA H100 80GB HBM3", 16, 116),
        ("cpu", 16, None),
    ],
)
def test_a_small_gpu_has_room_for_fewer_processes(device, together, waiting):
    assert room.together(device, 16) == together
    assert room.together(device, 1) == 1
    assert room.waiting(device) == waiting


@pytest.mark.parametrize(("timed", "most", "sizes"), [(True, 23, [23, 12]), (True, None, [35]), (False, 23, [35])])
def test_jobs_that_are_timed_wait_in_batches(tmp_path, monkeypatch, timed, most, sizes):
    jobs = [plan.Job({"number": i}, ()) for i in range(35)]
    found = []
    monkeypatch.setattr(Runner, "_run", lambda self, some, patience, timed: found.append(some))
    Runner(Clock(100.0), tmp_path, 2, {}, print).run(jobs, Patience(1.0, 1.0), timed=timed, most=most)
    assert [len(some) for some in found] == sizes
    assert [job for some in found for job in some] == jobs
