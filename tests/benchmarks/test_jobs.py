"""Jobs as processes that raise, die or hang."""

import os
import re

from benchmarks import gpu_suite
from benchmarks.gpu import plan
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
