"""The command line of the GPU suite, dry."""

import itertools
import json
import time

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import cases, check, peers, plan, record


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


# A kernel under development: with a scalar decay its gradient of beta is wrong, with a decay per channel it hangs.
ODD = """
import time
import jax
from osdn_jax.ops.delta_rule_operator import IMPLEMENTATIONS
from osdn_jax.ops.selection import Implementation

@jax.custom_vjp
def odd(beta):
    return beta

odd.defvjp(lambda beta: (beta, None), lambda _, d: (1.05 * d,))

def kernel(call, options):
    if call.log_decay is not None and call.log_decay.ndim == 4:
        time.sleep(1000)
    if call.log_decay is not None:
        call = call._replace(beta=odd(call.beta))
    return IMPLEMENTATIONS["chunk"].run(call, options)

IMPLEMENTATIONS["odd"] = Implementation(kernel)
"""


def suite(out, *arguments):
    """Return the exit status of a dry call, its rows by section and case, and the whole record."""
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


def test_without_time_nothing_is_run_and_all_is_recorded(tmp_path, monkeypatch, capsys):
    # Seconds pass between any two readings of the clock: the table that is printed is the one that was written.
    ticks = itertools.count(time.time(), 0.7)
    monkeypatch.setattr(record.time, "time", lambda: next(ticks))
    code, _, content = suite(tmp_path, "--budget", "0")
    assert code == 1
    assert content["identity"]["implementation"] == "mosaic_gpu_interpret"
    reasons = {row["reason"] for row in content["rows"]}
    assert reasons == {plan.OUT_OF_TIME, peers.NO_PEER}
    of_peers = len(peers.PEERS)
    count = len(cases.DRY_SMOKE) + 2 * len(check.DRY_CASES) + 1 + 7 * 2 * 3 + 2 * of_peers
    assert len(content["rows"]) == count
    assert capsys.readouterr().out == (tmp_path / "gpu-dry.md").read_text()
    # Repeating the call keeps the rows that exist.
    _, _, content = suite(tmp_path, "--stage", "check", "--budget", "0")
    assert len(content["rows"]) == count
    assert len(content["calls"]) == 2


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
def test_a_refused_call_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
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
    err = capsys.readouterr().err
    assert f"argument {option[0]}" in err
    assert err.count("\n") == 1


def test_the_file_is_named_after_the_device():
    assert gpu_suite.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


@pytest.mark.slow
def test_the_stages_run_dry_one_after_the_other(tmp_path, capsys):
    # Other tests cover the kernels' interpreter; one case a stage, as each is a process of several seconds.
    options = ("--rules", "pgdn", "--implementation", "chunk", "--cases", "channel decay, [ft]*")
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
