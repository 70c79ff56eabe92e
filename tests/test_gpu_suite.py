import dataclasses
import json
import os
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import cases, check, loop, peers, plan, record, roofline, timing
from benchmarks.gpu.jobs import Clock, Patience, Runner, worker_environment
from benchmarks.gpu.report import markdown
from osdn_jax.compare import Shape, parse_shapes
from osdn_jax.compare.measure import relative_error
from pallas_kernels.delta_rule.split_sequence import split_count

SHAPE = parse_shapes("B1T8192H64D128")[0]
IDENTITY = {
    "device": "NVIDIA H100 80GB HBM3",
    "dry": False,
    "source": "0123456789abcdef",
    "implementation": "mosaic_gpu",
    "jax": "0.11.2",
    "torch": "2.11",
    "fla-core": None,
}
CALL = {
    "date": "2026-01-01 00:00 UTC",
    "command": "python -m benchmarks.gpu_suite --stage ours",
    "commit": "abcdef012345",
    "driver": "580.0",
    "budget": 540.0,
    "seconds": 500.0,
}
REQUEST = plan.Request("mosaic_gpu", dry=False)


def owed(stage, known=(), request=REQUEST):
    return plan.plan(stage, known, request).owed


def everything(known=()):
    return [key for stage in plan.STAGES for key in owed(stage, known)]


def measured(key, **more):
    row = {"status": "measured", "median_seconds": 1e-3, "quartile_seconds": (9e-4, 1.1e-3), "host_bound": False}
    return {**key, **row, "difference": None, "bytes": 10**9, "flops": 10**11, **more}


def finished(key):
    if key["section"] in ("smoke", "check"):
        return {**key, "status": "pass", "error": 1e-3, "limit": 1e-2, "worst": "d_initial_state", "same": True}
    if key["section"] == "ceilings":
        return {**key, "status": "measured", "bytes_per_second": 4e12, "flops_per_second": 8e14}
    if key["section"] == "compile":
        return {**key, "status": "compiled", "seconds": 10.0}
    return measured(key)


def text(rows, *sections):
    content = {"identity": IDENTITY, "calls": [CALL], "rows": rows}
    return "\n".join(markdown(content, sections) if sections else markdown(content))


def test_the_floors_are_those_that_were_counted_by_hand():
    one = Shape(1, 1, 1, 1, 128, 128)
    assert roofline.least_flops(one, False) == 163_840
    assert roofline.least_flops(one, True) == 3 * 163_840
    sizes = dict.fromkeys("qkwv", 256)
    assert roofline.least_bytes(sizes, 256, False) == 1280
    assert roofline.least_bytes(sizes, 256, True) == 1280 + 4 * 256 + 256 + 4 * 256
    assert roofline.shares(1e-3, 10**9, 10**11, roofline.Ceilings(4e12, 4e14)) == pytest.approx((0.25, 0.25))
    assert roofline.per_head_and_token(1e-3, SHAPE) == pytest.approx(1.907, abs=1e-3)


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


def test_what_hung_in_the_smoke_stage_is_not_started_later():
    rows = [finished(key) for key in owed("smoke")]
    for row in rows:
        if row["case"] in ("channel decay, gradient", "hypergradient, token by token, forward", "Gram, forward"):
            row["status"] = "hung"
    checks = plan.plan("check", rows, REQUEST)
    skipped = {row["case"]: row["reason"] for row in checks.skipped}
    assert {row["case"] for row in checks.skipped} | {key["case"] for key in checks.owed} == set(cases.CASES)
    assert skipped["channel decay, D 256"] == "'channel decay, gradient' hung in the smoke stage"
    assert "hypergradient, trust, beta, documents" in skipped
    assert "Gram, T 1" in skipped
    assert not {"scalar decay", "hypergradient, paper"} & set(skipped)
    ours = plan.plan("ours", rows, REQUEST)
    left = {(key["rule"], key["program"]) for key in ours.owed if key.get("contender") == "ours"}
    assert ("kda", plan.FORWARD) in left
    assert ("kda", plan.BOTH) not in left
    assert not {(rule, program) for rule, program in left if rule in ("pgdn", "pkda")}
    assert {(key["rule"], key["program"]) for key in ours.owed if key.get("contender") == "xla"} == {
        (rule, program) for rule in plan.TIMED_RULES for program in plan.PROGRAMS
    }
    assert len(ours.owed) + len(ours.skipped) == len(owed("ours"))


def test_ours_runs_beside_a_peer_where_it_is_known_to_run():
    rows = [finished(key) for key in owed("ours")]
    for row in rows:
        if row.get("contender") == "ours" and row["program"] == plan.BOTH:
            row["status"] = "raised"
    assert all(not job.spec["beside"] for job in plan.plan("peers", [], REQUEST).jobs)
    assert all(job.spec["beside"] == [["ours", plan.FORWARD]] for job in plan.plan("peers", rows, REQUEST).jobs)


def test_what_is_missing_of_a_job_gets_a_reason():
    job = plan.plan("ours", [], REQUEST).jobs[1]
    rows = [measured(job.owed[0])]
    missing = plan.missing_rows(job.owed, rows, "died", "why")
    assert missing == [{**key, "status": "died", "reason": "why"} for key in job.owed[1:]]


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


def test_what_is_not_measured_is_in_the_table_by_name():
    keys = [key for stage in ("ours", "peers") for key in owed(stage)]
    rows = [finished(key) for key in keys if key.get("contender") != "peer"]
    missing = plan.missing_rows(keys, rows, "missing", "No module named 'fla'")
    table = text(sorted(rows + missing, key=plan.place))
    assert len(table) < 12_000
    assert "missing: B1T8192H64D128 delta_net forward peer and 49 more: No module named 'fla'" in table
    assert gpu_suite.status(rows + missing) == 0


def test_the_table_says_what_is_apart_and_what_passed_only_later():
    key = {"section": "time", "shape": plan.SHAPES[0], "rule": "kda", "program": plan.BOTH}
    ours = measured({**key, "contender": "ours"}, difference=0.05, differences={"o": 0.001, "d_beta": 0.05})
    peer = measured({**key, "contender": "peer"}, ours_seconds=5e-4)
    late = {**finished(owed("check")[0]), "before": ["hung"]}
    table = text([late, ours, peer])
    assert "B1T8192H64D128 kda f+b ours: d_beta 5.0e-02" in table
    assert re.search(r"\| kda f\+b \| 1\.000≠ .*\| 1\.000 \| 2\.00 \|", table)
    assert "of 1e-02, before: hung" in table


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        ({"section": "check"}, "pass", 0),
        ({"section": "check"}, "absent", 0),
        ({"section": "check"}, "fail", 1),
        ({"section": "check"}, "raised", 1),
        ({"section": "smoke"}, "hung", 1),
        ({"section": "check"}, "not run", 1),
        ({"section": "time", "contender": "ours"}, "raised", 1),
        ({"section": "time", "contender": "ours"}, "not run", 0),
        ({"section": "time", "contender": "peer"}, "raised", 0),
    ],
)
def test_the_exit_status_is_about_our_kernels(key, status, code):
    assert gpu_suite.status([{**key, "status": status}]) == code


TINY = check.DRY_CASES["scalar decay, tiny"]


@pytest.fixture(scope="module")
def scan():
    return check.both(TINY, "scan")


def test_a_right_kernel_passes(scan):
    row = check.compare(TINY, "random", 1, check.both(TINY, "chunk"), scan)
    assert row["status"] == "pass"
    assert set(row["errors"]) == {"o", "memory"} | {f"d_{n}" for n in ("q", "k", "v", "beta", "log_decay")} | {
        "d_initial_state"
    }


def test_a_wrong_gradient_fails(scan):
    def wrong(*arguments):
        out = scan(*arguments)
        return {**out, "d_beta": out["d_beta"] * 1.03}

    row = check.compare(TINY, "near-parallel", 1, wrong, scan)
    assert (row["status"], row["worst"], row["limit"]) == ("fail", "d_beta", check.GATE_LIMIT)
    assert row["error"] == pytest.approx(0.03, abs=2e-3)


def test_other_bits_the_second_time_fail(scan):
    calls = []

    def unsteady(*arguments):
        calls.append(1)
        out = scan(*arguments)
        return {**out, "o": out["o"] * jnp.bfloat16(1 + 2**-7 * (len(calls) - 1))}

    row = check.compare(TINY, "random", 1, unsteady, scan)
    assert (row["status"], row["same"]) == ("fail", False)


def test_a_number_that_is_none_fails():
    assert not check.judge({"o": 1e-3, "d_q": float("inf")})["kept"]


def test_float16_has_lower_limits():
    assert check.judge({"o": 5e-3})["kept"]
    assert not check.judge({"o": 5e-3}, "float16")["kept"]


@pytest.mark.parametrize("case", check.CASES.values(), ids=check.CASES)
def test_near_parallel_keys_are_near(case):
    short = dataclasses.replace(case, batch=1, length=min(case.length, 400))
    arrays, ids = check.draw(short, "near-parallel", 0)
    k = arrays["k"].astype(np.float64)
    assert np.einsum("btk,btk->bt", k[:, :-1, 0], k[:, 1:, 0]).min(initial=1.0) > 0.95
    assert (ids is None) == (not case.documents)
    assert arrays["k"].dtype == jnp.dtype(case.dtype)


@pytest.mark.parametrize(("decay", "options"), [(None, {}), ("scalar", {"erase": False}), ("channel", {})])
def test_the_loop_in_numpy_agrees_with_the_scan(decay, options):
    case = cases.Case(decay, 1, 20, 2, 2, 8, 4, write_key=decay is not None, **options)
    arrays, _ = check.draw(case, "random", 0)
    with jax.enable_x64(True):
        x = {name: a.astype(np.float64) for name, a in arrays.items()}
        cotangents = {name: a.astype(np.float64) for name, a in check.draw_cotangents(case, arrays, None, 0).items()}
        want = check.both(case, "scan")(x, None, cotangents)
    got = loop.value_and_gradient(x, cotangents, erase=case.erase)
    assert set(got) == set(want)
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-12, name


def test_the_judges_are_there_and_are_asked():
    case = cases.DRY_CASES["channel decay, tiny, judged by NumPy"]
    arrays, ids = check.draw(case, "random", 0)
    cotangents = check.draw_cotangents(case, arrays, ids, 0)
    assert check.judge_of(case)(arrays, ids, cotangents)["o"].dtype == np.float64
    assert {case.judge for case in cases.CASES.values()} == {"scan", "numpy"}


def test_a_batch_is_judged_one_sequence_after_the_other():
    case = cases.Case("scalar", 2, 20, 2, 1, 8, 4, documents=True)
    arrays, ids = check.draw(case, "random", 0)
    cotangents = check.draw_cotangents(case, arrays, ids, 0)
    got, want = (program(arrays, ids, cotangents) for program in (check.judge_of(case), check.both(case, "scan")))
    assert set(got) == set(want)
    for name in want:
        assert relative_error(got[name], want[name].astype(np.float64)) < 1e-2, name


def test_write_keys_and_float16_are_judged_too():
    case = cases.Case(preset="gram", multiply=True, dtype="float16", length=20, batch=1, key_dim=8, value_dim=8)
    row = check.compare(case, "random", 1, check.both(case, "chunk"), check.judge_of(case))
    assert (row["status"], row["limit"] <= 6e-3) == ("pass", True)


def ways(case, keys, seed):
    """How the kernel goes through the chunks of each head: far from the bounds, tested and kept, or done again."""
    x, _ = check.draw(case, keys, seed)
    x = {name: a.astype(np.float64) for name, a in x.items()}
    lo, hi = cases.BINDING["bounds"]
    u, beta, forget = np.square(x["k"]), x["beta"], np.exp(x["log_forget"])
    d = np.broadcast_to(x["initial"], u[:, 0].shape)
    found = {}
    for start in range(0, case.length, 64):
        first, left, added, values = d, np.ones_like(beta[:, 0]), [], []
        for t in range(start, min(start + 64, case.length)):
            b, kept = beta[:, t], forget[:, t]
            added.append((b * (1 - b * np.sum(d * u[:, t], axis=-1)))[..., None] * u[:, t])
            d, left = 1 + kept[..., None] * (d - 1) + added[-1], left * kept
            values.append(d)
            d = np.clip(d, lo, hi)
        values, added = np.array(values), np.array(added)
        last = 1 + left[..., None] * (first - 1)
        least = np.minimum(first, last) + np.minimum(added, 0).sum(0)
        most = np.maximum(first, last) + np.maximum(added, 0).sum(0)
        again = ((values < lo) | (values > hi)).any((0, -1))
        close = ((least < lo) | (most > hi)).any(-1)
        way = np.where(again, "again", np.where(close, "kept", "far"))
        for head in range(case.heads):
            found.setdefault(head % 4, set()).update(way[:, head])
    return found


@pytest.mark.parametrize("keys", check.KEYS)
def test_peaked_keys_leave_the_bounds_nearly_leave_them_and_stay_far(keys):
    case = cases.CASES["hypergradient, bounds that bind"]
    found = [ways(case, keys, seed) for seed in range(case.seeds)]
    assert all(set().union(*one.values()) == {"far", "kept", "again"} for one in found)
    assert all({"kept", "again"} <= one[2] for one in found)  # a head that goes from one to the other
    smoke = cases.SMOKE["hypergradient, token by token, gradient"]
    assert set().union(*ways(smoke, "random", 0).values()) == {"far", "kept", "again"}


@pytest.mark.parametrize("section", ["smoke", "check"])
def test_every_case_names_its_kernel_which_serves_it(section):
    """Without a GPU it is refused for that reason alone, and nothing else runs in its place."""
    for case in cases.cases(section, dry=False).values():
        arrays, ids = check.draw(dataclasses.replace(case, length=1, batch=1), "random", 0)
        with pytest.raises(NotImplementedError, match="'mosaic_gpu': got a cpu, the kernels need a GPU"):
            jax.eval_shape(lambda x, i, case=case: cases.outputs(case, x, i, "mosaic_gpu"), arrays, ids)


@pytest.mark.parametrize("rule", plan.TIMED_RULES)
def test_every_rule_to_time_names_its_kernels_which_serve_it(rule):
    for shape in plan.SHAPES:
        arguments = timing.abstract(rule, parse_shapes(shape)[0])
        with pytest.raises(NotImplementedError, match="'mosaic_gpu': got a cpu, the kernels need a GPU"):
            jax.eval_shape(timing.program_of(rule, "mosaic_gpu", False), arguments)
    jobs = [job for stage in plan.STAGES for job in plan.plan(stage, [], REQUEST).jobs]
    assert {job.spec["implementation"] for job in jobs} == {"mosaic_gpu"}


def test_the_cases_reach_pieces_waves_types_and_lengths():
    all_cases = cases.CASES.values()
    rules = [case for case in all_cases if case.preset is None]

    def pieces(c):
        return split_count(c.batch, c.heads, -(-c.length // 64), c.key_dim, c.value_dim)

    assert {case.decay for case in rules if pieces(case) > 1} == {"scalar", "channel"}
    assert max(case.batch * case.heads * -(-case.length // 64) for case in rules) > 4 * 132
    assert max(case.batch * case.heads * case.value_dim // 64 for case in rules) > 4 * 132  # the walks'
    for some in (rules, [c for c in all_cases if c.preset == "gram"], [c for c in all_cases if c.preset == "binding"]):
        assert max(case.batch * case.heads for case in some) > 2 * 132
    for some in (rules, [case for case in all_cases if case.preset not in (None, "gram")]):
        assert "float16" in {case.dtype for case in some}
        assert 1 in {case.length for case in some}
    assert {(64, 128), (128, 64), (256, 64)} <= {(case.key_dim, case.value_dim) for case in rules}


def test_the_inputs_to_time_are_as_promised():
    shape = parse_shapes("B2T100H4Hk2D8")[0]
    pool, other = timing.pools("pkda", shape, 2)
    arrays, cotangent = timing.fill(pool, shape, 0)
    expected = timing.abstract("pkda", shape)
    assert {n: (x.shape, x.dtype) for n, x in arrays.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}
    assert "initial_state" not in arrays
    assert cotangent.shape == arrays["v"].shape == timing.output_shape(shape)
    assert not np.array_equal(arrays["v"], timing.fill(other, shape, 0)[0]["v"])
    assert len({tuple(v) for v in np.asarray(arrays["v"], np.float32).reshape(200, -1)[:100].tolist()}) > 50


def test_batches_alternate_and_are_long_enough(monkeypatch):
    now, log = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def contender(name, seconds):
        def call(i):
            now[0] += 1e-5
            return log.append(name)

        return timing.Contender(name, call, lambda out: now.__setitem__(0, now[0] + seconds))

    a, b = contender("a", 0.01), contender("b", 0.0)
    for c in (a, b):
        c.settle(0.05)
    assert b.calls * 1e-5 >= 0.04
    log.clear()
    timing.take_turns([a, b], 2)
    assert re.fullmatch("(a+b+){2}", "".join(log))
    assert b.row()["host_bound"]


def test_a_peer_that_is_not_installed_says_so():
    with pytest.raises(peers.NoPeer, match="fla.ops.kda.chunk_kda: ModuleNotFoundError"):
        peers.load("kda")
    with pytest.raises(peers.NoPeer, match="no such rule"):
        peers.load("osdn")
    with pytest.raises(peers.NoPeer, match="as many key heads as value heads only"):
        peers.load("pkda", parse_shapes("B1T8H4Hk2D8")[0])


def test_a_peer_gets_our_arguments_by_its_names(monkeypatch):
    def chunk_precond_gated_delta_rule(
        q, k, v, g_atk, g, beta_atk, beta, output_final_state, use_qk_l2norm_in_kernel, log_atk_scale
    ):
        assert not output_final_state
        assert not use_qk_l2norm_in_kernel
        return (q, k, v, g_atk, g, beta_atk, beta, log_atk_scale), None, None

    module = types.SimpleNamespace(chunk_precond_gated_delta_rule=chunk_precond_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace())
    for name in ("fla", "fla.ops", "fla.ops.precond_gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, module)
    names = ("q", "k", "v", "gram_log_decay", "log_decay", "gram_gain", "beta", "center")
    assert peers.load("pgdn")({name: name for name in names}) == names
    module.chunk_precond_gated_delta_rule = lambda q, k: None
    with pytest.raises(peers.NoPeer, match="takes no beta, beta_atk, g, g_atk"):
        peers.load("pgdn")


def test_the_refusal_of_a_gated_backward_pass_is_said_in_short(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    said = (
        "Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results for gated chunk_bwd_dqkwg (see #640). "
        "Please upgrade Triton to >= 3.7.1 or install tilelang: `pip install tilelang`"
    )
    status, reason = timing.why(RuntimeError(said))
    assert status == "refused"
    assert reason.endswith("backward pass on Hopper with Triton 3.4 to 3.7.0 (here 3.6.0) without tilelang")
    row = {**owed("peers")[2], "status": status, "reason": reason}
    assert reason in text([row])
    assert timing.why(RuntimeError("other"))[0] == "raised"
    assert timing.why(peers.NoPeer("none"))[0] == "missing"


def test_the_gradient_of_vectors_that_are_normalised_first():
    x, cotangent = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    unit = jax.vjp(lambda y: y / jnp.linalg.norm(y, axis=-1, keepdims=True), x)[1](cotangent)[0]
    np.testing.assert_allclose(peers.along_sphere(x, cotangent), unit, atol=1e-6)


@pytest.mark.parametrize("normalizes", [False, True])
def test_a_peers_gradients_are_compared(monkeypatch, normalizes):
    """Its gradient of beta is wrong."""
    rule = "delta_net"
    peer = dataclasses.replace(peers.PEERS[rule], normalizes=normalizes)
    monkeypatch.setitem(peers.PEERS, rule, peer)

    def run(x):
        if normalizes:
            x = x | {name: x[name] / jnp.linalg.norm(x[name], axis=-1, keepdims=True) for name in ("q", "k")}
        return timing.program_of(rule, "chunk", False)(x)

    def program(run, cotangent, gradient):
        def both(x):
            out, pull = jax.vjp(run, x)
            gradients = pull(cotangent)[0]
            return out, gradients | {"beta": 1.1 * gradients["beta"]}

        return both if gradient else run

    monkeypatch.setattr(peers, "load", lambda rule, shape=None: run)
    monkeypatch.setattr(peers, "program", program)
    monkeypatch.setattr(peers, "tensors", lambda rule, arrays: {n: arrays[n] for n in peer.arguments.values()})
    monkeypatch.setattr(peers, "as_jax", lambda x: x)
    monkeypatch.setattr(peers, "synchronize", jax.block_until_ready)
    monkeypatch.setattr(peers, "release", lambda: None)
    rows, programs = [], [["peer", program] for program in plan.PROGRAMS]
    spec = {"rule": rule, "shape": "B1T64H1D64", "dry": True, "implementation": "chunk"}
    race = timing.Race({**spec, "timed": programs, "beside": [["ours", plan.BOTH]]}, rows.append)
    race.prepare(np.inf)
    race.race(np.inf)
    rows = {row["program"]: row for row in rows if "event" not in row}
    assert rows[plan.FORWARD]["difference"] < 0.02
    assert rows[plan.BOTH]["in"] == "d_beta"
    assert rows[plan.BOTH]["differences"].pop("d_beta") == pytest.approx(0.1, abs=5e-3)
    assert max(rows[plan.BOTH]["differences"].values()) < 0.02
    assert rows[plan.BOTH]["ours_seconds"] > 0
    assert "ours_seconds" not in rows[plan.FORWARD]


def test_a_gradient_that_there_is_none_of_is_infinitely_far():
    assert timing.difference(None, jnp.ones(3)) == np.inf
    assert timing.difference(jnp.full(3, jnp.nan), jnp.ones(3)) == np.inf
    assert timing.difference(jnp.zeros(3), jnp.zeros(3)) == 0


def run_jobs(tmp_path, jobs, budget=100.0, patience=100.0):
    rows = []
    runner = Runner(Clock(budget), tmp_path, 2, worker_environment(os.environ, True), rows.append)
    runner.run(jobs, Patience(patience, patience, starting=patience), timed=False)
    return rows


def test_a_kernel_that_raises_and_a_process_that_dies_end_nothing(tmp_path):
    request = plan.Request("mosaic_gpu", dry=True, cases="scalar decay, tiny")
    (job,) = plan.plan("check", [], request).jobs
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
    job = plan.plan("ours", [], REQUEST).jobs[1]
    rows = run_jobs(tmp_path, [job], patience=0.0)
    assert [row["status"] for row in rows] == ["hung"] * len(job.owed)


# What a kernel under work may do: under a scalar decay its gradient of beta is wrong, and under a decay per channel it
# does not come back.
ODD = """
import time
import jax
from osdn_jax.ops.delta_rule import IMPLEMENTATIONS

@jax.custom_vjp
def odd(beta):
    return beta

odd.defvjp(lambda beta: (beta, None), lambda _, d: (1.05 * d,))

def kernel(call, **options):
    if call.log_decay is not None and call.log_decay.ndim == 4:
        time.sleep(1000)
    if call.log_decay is not None:
        call = call._replace(beta=odd(call.beta))
    return IMPLEMENTATIONS["chunk"](call, **options)

IMPLEMENTATIONS["odd"] = kernel
"""


def suite(out, *arguments):
    """The exit status and the rows of a dry call, by section and case, and the whole record."""
    code = gpu_suite.main(["--dry", "--out", str(out), *arguments])
    content = json.loads((out / "gpu-dry.json").read_text())
    return code, {(row["section"], row.get("case"), row.get("keys")): row for row in content["rows"]}, content


@pytest.mark.slow
def test_a_wrong_kernel_fails_and_one_that_hangs_is_ended(tmp_path, monkeypatch, capsys):
    (tmp_path / "odd_kernels.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ("--implementation", "odd", "--import", "odd_kernels")
    forward = "channel decay, forward"
    code, rows, _ = suite(tmp_path, "--stage", "smoke", "--cases", forward, "--patience", "3", *options)
    assert (code, rows["smoke", forward, "random"]["status"]) == (1, "hung")
    assert rows["smoke", forward, "random"]["reason"].startswith("no sign of life for 3 s")
    capsys.readouterr()
    code, rows, _ = suite(tmp_path, "--stage", "check", "--cases", "*decay, tiny*", *options)
    assert code == 1
    wrong = rows["check", "scalar decay, tiny", "random"]
    assert (wrong["status"], wrong["worst"]) == ("fail", "d_beta")
    assert wrong["error"] == pytest.approx(0.05, abs=5e-3)
    left = rows["check", "channel decay, tiny, judged by NumPy", "random"]
    assert (left["status"], left["reason"]) == (plan.NOT_RUN, "'channel decay, forward' hung in the smoke stage")
    assert "**fail** d_beta 5.0e-02 of 2e-02" in capsys.readouterr().out


def test_without_time_nothing_is_run_and_all_is_recorded(tmp_path, capsys):
    code, _, content = suite(tmp_path, "--budget", "0")
    assert code == 1
    assert content["identity"]["implementation"] == "mosaic_gpu_interpret"
    reasons = {row["reason"] for row in content["rows"]}
    assert reasons == {plan.OUT_OF_TIME, peers.NO_PEER}
    of_peers = len(peers.PEERS)
    count = len(cases.DRY_SMOKE) + 2 * len(check.DRY_CASES) + 1 + 7 * 2 * 3 + 2 * of_peers
    assert len(content["rows"]) == count
    assert capsys.readouterr().out == (tmp_path / "gpu-dry.md").read_text()
    # What was left is done by the same call again, and what there is stays.
    _, _, content = suite(tmp_path, "--stage", "check", "--budget", "0")
    assert len(content["rows"]) == count
    assert len(content["calls"]) == 2


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
    assert again.rows[1]["status"] == "hung"  # it is not lost to a later call that did not reach it
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the suite needs a GPU; --dry shows on any machine"),
        (["--dry", "--from", "nowhere.json"], "--from: nowhere.json is not there"),
        (["--dry", "--cases", "none*"], "--cases: no case matches 'none*'"),
        (["--dry", "--out", "file"], "--out: cannot make file: "),
        (["--dry", "--out", "broken"], "broken/gpu-dry.json: cannot be read as results of this suite"),
        (["--dry", "--out", "other"], "other/gpu-dry.json: its results are of device a TPU (here cpu)"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, content in (("broken", "{"), ("other", None)):
        (tmp_path / name).mkdir()
        content = content or json.dumps(
            {"format": record.FORMAT, "identity": {"device": "a TPU"}, "rows": [], "calls": []}
        )
        (tmp_path / name / "gpu-dry.json").write_text(content)
    assert gpu_suite.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("option", [("--budget", "nan"), ("--slots", "0"), ("--patience", "-1"), ("--stage", "none")])
def test_options_have_ranges(option, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_suite.main(["--dry", *option])
    assert error.value.code == 2
    assert f"argument {option[0]}" in capsys.readouterr().err


def test_the_file_is_named_after_the_device():
    assert gpu_suite.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.slow
def test_the_stages_run_dry_one_after_the_other(tmp_path, capsys):
    # Of the kernels' interpreter there are tests enough.
    options = ("--rules", "pgdn", "--implementation", "chunk", "--cases", "*decay, [ft]*")
    found = {}
    for stage in plan.STAGES:
        code, _, content = suite(tmp_path, "--stage", stage, *options)
        assert code == 0, stage
        found[stage] = {row["status"] for row in content["rows"] if row["call"] == len(content["calls"]) - 1}
        table = capsys.readouterr().out
        assert len(content["calls"]) == plan.STAGES.index(stage) + 1
    assert found == {
        "smoke": {"pass"},
        "check": {"pass"},
        "ours": {"measured"},
        "peers-compile": {"missing"},
        "peers": {"missing"},
    }
    rows = {(row["program"], row["contender"]): row for row in content["rows"] if row["section"] == "time"}
    assert {(program, contender) for program in plan.PROGRAMS for contender in plan.CONTENDERS} == set(rows)
    for program in plan.PROGRAMS:
        assert rows[program, "ours"]["difference"] == 0
        assert rows[program, "xla"]["ours_seconds"] == rows[program, "ours"]["median_seconds"]
        low, high = rows[program, "ours"]["quartile_seconds"]
        assert 0 < low <= rows[program, "ours"]["median_seconds"] <= high
    assert set(rows[plan.BOTH, "ours"]["differences"]) == {"o"} | {
        f"d_{name}" for name in ("q", "k", "v", "beta", "log_decay", "gram_log_decay", "gram_gain", "center")
    }
    assert "missing: B1T64H2Hk1D64 pgdn forward peer and 1 more: fla.ops.precond_gated_delta_rule" in table
