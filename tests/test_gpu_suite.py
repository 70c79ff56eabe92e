import json
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import check, floors, peers, plan, timing
from benchmarks.gpu.jobs import Clock, Runner
from benchmarks.gpu.report import markdown
from osdn_jax.comparison import Shape, parse_shapes

SHAPE = parse_shapes("B1T8192H64D128")[0]
ABOUT = {
    "date": "2026-01-01 00:00 UTC",
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.0",
    "jax": "0",
    "jaxlib": "0",
    "python": "3",
    "command": "python",
    "implementation": "mosaic_gpu",
    "packages": {"torch": "2", "fla-core": None},
}


def everything(**options):
    return plan.stages(plan.SECTIONS, plan.RULES, "mosaic_gpu", dry=False, **options)


def measured(key, **more):
    row = {"status": "measured", "median_seconds": 1e-3, "quartile_seconds": (9e-4, 1.1e-3), "host_bound": False}
    return {**key, **row, "difference": None, "bytes": 10**9, "flops": 10**11, **more}


def finished(key):
    if key["section"] == "check":
        return {**key, "status": "pass", "error": 1e-3, "limit": 1e-2, "worst": "d_initial_state", "same": True}
    if key["section"] == "ceilings":
        return {**key, "status": "measured", "bytes_per_second": 4e12, "flops_per_second": 8e14}
    return measured(key)


def owed(stages):
    return [key for stage in stages for job in stage for key in job.owed]


def text(rows):
    return "\n".join(markdown({"environment": ABOUT, "budget": 540.0, "seconds": 500.0, "rows": rows}))


def test_the_floors_are_those_that_were_counted_by_hand():
    one = Shape(1, 1, 1, 1, 128, 128)
    assert floors.least_flops(one, False) == 163_840
    assert floors.least_flops(one, True) == 3 * 163_840
    sizes = dict.fromkeys("qkwv", 256)
    assert floors.least_bytes(sizes, 256, False) == 1280
    assert floors.least_bytes(sizes, 256, True) == 1280 + 4 * 256 + 256 + 4 * 256
    assert floors.shares(1e-3, 10**9, 10**11, floors.Ceilings(4e12, 4e14)) == pytest.approx((0.25, 0.25))
    assert floors.per_head_and_token(1e-3, SHAPE) == pytest.approx(1.907, abs=1e-3)


def test_every_rule_at_every_shape_owes_every_program():
    keys = owed(everything())
    assert len(keys) == 2 * len(check.CASES) + 1 + len(plan.SHAPES) * len(plan.RULES) * 2 * 3
    assert len({json.dumps(key) for key in keys}) == len(keys)
    backwards = list(reversed(keys))
    assert sorted(backwards, key=plan.place)[: len(check.CASES)] == keys[: len(check.CASES)]
    first, second = everything()
    assert first[0].spec["kind"] == "check"
    assert {job.spec["contenders"] for job in second} == {("xla",)}


def test_what_is_missing_of_a_job_gets_a_reason():
    job = everything()[1][0]
    rows = [measured(job.owed[0])]
    assert plan.missing_rows(job.owed, rows, "died", "why") == [{**job.owed[1], "status": "died", "reason": "why"}]


def test_the_table_fits_the_end_of_a_log():
    rows = [finished(key) for key in owed(everything())]
    table = text(rows)
    assert len(table) < 12_000
    assert "| kda f+b | 1.000 | 10.0% |" in table
    assert "H100" in table
    assert "fla-core not installed" in table
    assert "## Not measured" not in table
    assert gpu_suite.status(rows) == 0


def test_what_is_not_measured_is_in_the_table_by_name():
    rows = [finished(key) for key in owed(everything())]
    for row in rows:
        if row.get("contender") == "peer":
            row.clear()
    rows = [row for row in rows if row]
    missing = plan.missing_rows(owed(everything()), rows, "missing", "No module named 'fla'")
    table = text(sorted(rows + missing, key=plan.place))
    assert len(table) < 12_000
    assert "missing: B1T8192H64D128 delta_net forward peer and 55 more: No module named 'fla'" in table
    assert gpu_suite.status(rows + missing) == 0


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [
        ({"section": "check"}, "pass", 0),
        ({"section": "check"}, "absent", 0),
        ({"section": "check"}, "fail", 1),
        ({"section": "check"}, "raised", 1),
        ({"section": "check"}, "left out", 1),
        ({"section": "time", "contender": "ours"}, "raised", 1),
        ({"section": "time", "contender": "ours"}, "left out", 0),
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


@pytest.mark.parametrize("case", check.CASES.values(), ids=check.CASES)
def test_near_parallel_keys_are_near(case):
    arrays, ids = check.draw(case, "near-parallel", 0)
    k = arrays["k"].astype(np.float64)
    assert np.einsum("btk,btk->bt", k[:, :-1, 0], k[:, 1:, 0]).min() > 0.95
    assert (ids is None) == (not case.documents)


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


def run_jobs(tmp_path, jobs, budget=100.0, patience=100.0):
    rows = []
    Runner(Clock(budget), tmp_path, 2, patience, True, rows.append).run([jobs])
    return rows


def test_a_kernel_that_raises_and_a_process_that_dies_end_nothing(tmp_path):
    spec = {"kind": "check", "dry": True, "implementation": "mosaic_gpu", "seeds": 1, "case": "scalar decay, tiny"}
    keys = [{"section": "check", "case": spec["case"], "keys": keys} for keys in check.KEYS]
    dead = {"section": "check", "case": "none", "keys": "random"}
    jobs = [plan.Job({**spec, "case": "none"}, (dead,)), plan.Job(spec, tuple(keys))]
    rows = {(row["case"], row["keys"]): row for row in run_jobs(tmp_path, jobs)}
    assert rows["none", "random"]["status"] == "died"
    assert rows["none", "random"]["reason"] == "exit status 1: KeyError: 'none'"
    for key in keys:
        row = rows[key["case"], key["keys"]]
        assert row["status"] == "raised"
        assert re.match("NotImplementedError: .*need a GPU", row["reason"])
    assert gpu_suite.status(list(rows.values())) == 1


def test_a_process_that_hangs_is_ended(tmp_path):
    job = everything()[1][0]
    rows = run_jobs(tmp_path, [job], patience=0.0)
    assert [row["status"] for row in rows] == ["hung", "hung"]


def test_without_time_everything_is_left_out_and_recorded(tmp_path, capsys):
    arguments = ["--dry", "--budget", "0", "--out", str(tmp_path)]
    assert gpu_suite.main(arguments) == 1
    record = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert record["environment"]["implementation"] == "mosaic_gpu_interpret"
    assert {row["reason"] for row in record["rows"]} == {plan.OUT_OF_TIME}
    assert len(record["rows"]) == 2 * len(check.DRY_CASES) + 1 + 7 * 2 * 3
    assert capsys.readouterr().out == (tmp_path / "gpu-dry.md").read_text()


def test_it_asks_for_a_gpu():
    with pytest.raises(SystemExit, match="--dry"):
        gpu_suite.main([])


def test_the_file_is_named_after_the_device():
    assert gpu_suite.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.slow
def test_the_dry_run_runs(tmp_path, capsys):
    arguments = ["--dry", "--rules", "pgdn", "--implementation", "chunk", "--out", str(tmp_path)]
    assert gpu_suite.main(arguments) == 0  # of the kernels' interpreter there are tests enough
    rows = json.loads((tmp_path / "gpu-dry.json").read_text())["rows"]
    found = {(row["program"], row["contender"]): row for row in rows if row["section"] == "time"}
    statuses = {"ours": "measured", "peer": "missing", "xla": "measured"}
    assert {key: row["status"] for key, row in found.items()} == {
        (program, contender): status for program in plan.PROGRAMS for contender, status in statuses.items()
    }
    for program in plan.PROGRAMS:
        assert found[program, "xla"]["difference"] == 0
        low, high = found[program, "ours"]["quartile_seconds"]
        assert 0 < low <= found[program, "ours"]["median_seconds"] <= high
    assert {row["status"] for row in rows if row["section"] != "time"} == {"pass", "measured"}
    table = capsys.readouterr().out
    assert table == (tmp_path / "gpu-dry.md").read_text()
    assert "missing: B1T64H1D64 pgdn forward peer and 1 more: fla.ops.precond_gated_delta_rule" in table
