"""Kernels against a reference: what passes, what fails, and the references themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import cases, check, loop
from osdn_jax.compare.measure import relative_error

TINY = check.DRY_CASES["scalar decay, tiny"]


@pytest.fixture(scope="module")
def scan():
    return check.both(TINY, "scan")


def test_a_right_kernel_passes(scan):
    row = check.compare(TINY, "random", 1, check.both(TINY, "chunk"), scan)
    assert row["status"] == "pass"
    assert set(row["errors"]) == {"o", "state"} | {f"d_{n}" for n in ("q", "k", "v", "beta", "log_decay")} | {
        "d_initial_state"
    }


def test_a_wrong_gradient_fails(scan):
    def wrong(*arguments):
        out = scan(*arguments)
        return {**out, "d_beta": out["d_beta"] * 1.03}

    row = check.compare(TINY, "near-parallel", 1, wrong, scan)
    assert (row["status"], row["worst"], row["limit"]) == ("fail", "d_beta", check.GATE_LIMIT)
    assert row["error"] == pytest.approx(0.03, abs=2e-3)


def test_a_second_run_with_other_bits_fails(scan):
    calls = []

    def unsteady(*arguments):
        calls.append(1)
        out = scan(*arguments)
        return {**out, "o": out["o"] * jnp.bfloat16(1 + 2**-7 * (len(calls) - 1))}

    row = check.compare(TINY, "random", 1, unsteady, scan)
    assert (row["status"], row["same"]) == ("fail", False)


def test_a_value_that_is_not_finite_fails():
    assert not check.judge({"o": 1e-3, "d_q": float("inf")})["kept"]


def test_narrower_errors_are_asked_of_more_precise_types():
    assert check.judge({"o": 5e-3})["kept"]
    assert not check.judge({"o": 5e-3}, "float16")["kept"]
    assert check.judge({"o": 9e-6, "d_beta": 1.9e-5}, "float32")["kept"]
    assert not check.judge({"o": 1.1e-5}, "float32")["kept"]


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


def test_the_numpy_reference_is_used():
    case = cases.DRY_CASES["channel decay, tiny, judged by NumPy"]
    arrays, ids = check.draw(case, "random", 0)
    cotangents = check.draw_cotangents(case, arrays, ids, 0)
    assert check.judge_of(case)(arrays, ids, cotangents)["o"].dtype == np.float64
    assert {case.judge for case in cases.CASES.values()} == {"scan", "numpy"}


def test_the_reference_runs_one_sequence_at_a_time():
    case = cases.Case("scalar", 2, 20, 2, 1, 8, 4, documents=True)
    arrays, ids = check.draw(case, "random", 0)
    cotangents = check.draw_cotangents(case, arrays, ids, 0)
    got, want = (program(arrays, ids, cotangents) for program in (check.judge_of(case), check.both(case, "scan")))
    assert set(got) == set(want)
    for name in want:
        assert relative_error(got[name], want[name].astype(np.float64)) < 1e-2, name


def test_write_keys_and_float16_are_checked_too():
    case = cases.Case(preset="gram", multiply=True, dtype="float16", length=20, batch=1, key_dim=8, value_dim=8)
    row = check.compare(case, "random", 1, check.both(case, "chunk"), check.judge_of(case))
    assert (row["status"], row["limit"] <= 6e-3) == ("pass", True)
