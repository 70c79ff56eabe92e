"""Jobs of each stage, given the rows that exist."""

import json
import re

from benchmarks.gpu import cases, check, peers, plan
from osdn_jax.compare import parse_shapes
from support.gpu_records import REQUEST, everything, finished, measured, owed


def test_every_rule_at_every_shape_owes_every_program():
    keys = everything()
    of_peers = [rule for rule in plan.TIMED_RULES if rule in peers.PEERS]
    heads = {re.sub(r"[BT]\d+", "", shape) for shape in plan.SHAPES}
    times = len(plan.SHAPES) * 2 * (2 * len(plan.TIMED_RULES) + len(of_peers))
    compiled = len(heads) * 2 * len(of_peers)
    assert len(keys) == len(cases.SMOKE) + 2 * len(check.CASES) + 1 + times + compiled
    assert len({json.dumps(key) for key in keys}) == len(keys)
    backwards = list(reversed(keys))
    assert (
        sorted(backwards, key=plan.place)[: len(cases.SMOKE) + len(check.CASES)]
        == keys[: len(cases.SMOKE) + len(check.CASES)]
    )
    assert any(parse_shapes(shape)[0].heads == 4 * parse_shapes(shape)[0].key_heads == 64 for shape in plan.SHAPES)


def test_a_repeated_stage_does_what_is_left():
    rows = [finished(key) for key in everything()]
    assert everything(rows) == []
    hung, failed, late = rows[20], rows[21], rows[22]
    hung["status"], failed["status"], late["status"] = "hung", "fail", plan.NOT_RUN
    assert owed("check", rows) == [plan.key_of(hung), plan.key_of(late)]


def test_kernels_that_hang_in_the_smoke_stage_are_not_started_later():
    rows = [finished(key) for key in owed("smoke")]
    for row in rows:
        if row["case"] in ("channel decay, gradient", "hypergradient, sequential fallback, forward", "Gram, forward"):
            row["status"] = "hung"
    checks = plan.plan_stage("check", rows, REQUEST)
    skipped = {row["case"]: row["reason"] for row in checks.skipped}
    assert {row["case"] for row in checks.skipped} | {key["case"] for key in checks.owed} == set(cases.CASES)
    assert skipped["channel decay, D 256"] == "'channel decay, gradient' hung in the smoke stage"
    assert "hypergradient, trust, beta, documents" in skipped
    assert "Gram, T 1" in skipped
    assert not {"scalar decay", "hypergradient, paper"} & set(skipped)
    ours = plan.plan_stage("ours", rows, REQUEST)
    left = {(key["rule"], key["program"]) for key in ours.owed if key.get("contender") == "ours"}
    assert ("kda", plan.FORWARD) in left
    assert ("kda", plan.BOTH) not in left
    assert not {(rule, program) for rule, program in left if rule in ("pgdn", "pkda")}
    assert {(key["rule"], key["program"]) for key in ours.owed if key.get("contender") == "xla"} == {
        (rule, program) for rule in plan.TIMED_RULES for program in plan.PROGRAMS
    }
    assert len(ours.owed) + len(ours.skipped) == len(owed("ours"))


def test_ours_runs_with_a_peer_if_it_is_known_to_run():
    rows = [finished(key) for key in owed("ours")]
    for row in rows:
        if row.get("contender") == "ours" and row["program"] == plan.BOTH:
            row["status"] = "raised"
    assert all(not job.spec["beside"] for job in plan.plan_stage("peers", [], REQUEST).jobs)
    assert all(job.spec["beside"] == [["ours", plan.FORWARD]] for job in plan.plan_stage("peers", rows, REQUEST).jobs)


def test_missing_rows_of_a_job_get_a_reason():
    job = plan.plan_stage("ours", [], REQUEST).jobs[1]
    rows = [measured(job.owed[0])]
    missing = plan.missing_rows(job.owed, rows, "died", "why")
    assert missing == [{**key, "status": "died", "reason": "why"} for key in job.owed[1:]]
