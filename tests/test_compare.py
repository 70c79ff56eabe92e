"""`python -m osdn_jax.compare`: right, wrong and unavailable implementations, and the command line."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import osdn_jax.compare
from osdn_jax.compare import (
    COMPARED_RULES,
    TOLERANCES,
    Result,
    Shape,
    draw_cotangents,
    draw_inputs,
    main,
    measure,
    parse_shapes,
    program,
    ratio,
    value_and_gradient,
)
from osdn_jax.compare import reference as judge
from osdn_jax.compare.inputs import input_bytes
from osdn_jax.compare.plot import plot_results
from osdn_jax.compare.report import duration, result_table, size
from osdn_jax.ops.delta_rule_operator import IMPLEMENTATIONS
from osdn_jax.ops.selection import Implementation
from support import assert_close, jit
from support.runs import ROOT

pytestmark = pytest.mark.slow

SMALL = "B1T5H2Hk1K3V2"
KNOWN = ("scan", "chunk", "mosaic_gpu", "mosaic_gpu_interpret", "triton", "triton_interpret", "auto")


@pytest.fixture
def compare(tmp_path, capsys):
    """Run the command line; return its exit status, its output, the results by implementation, and the JSON record."""

    def run(*flags, rules="delta_net", shapes=SMALL):
        file = tmp_path / "results.json"
        status = main(["--rules", rules, "--shapes", shapes, "--repeats", "2", "--json", str(file), *flags])
        record = json.loads(file.read_text())
        return status, capsys.readouterr().out, {r["implementation"]: r for r in record["results"]}, record

    return run


def altered(change):
    """Return the scan with `change` applied to its outputs."""

    def run(call, options, **more):
        out, state = IMPLEMENTATIONS["scan"].run(call, options, **more)
        return change(out), state

    return Implementation(run, mixes_segments=False)


def refused(call, options):
    raise NotImplementedError("needs a\nHopper GPU, this is a toaster")


# --- measurements ---------------------------------------------------------------------------------------------------


def test_every_implementation_has_a_row_with_all_numbers(compare):
    status, printed, results, record = compare()
    assert status == 0
    assert list(results) == ["scan", "chunk", "auto"]
    for name, row in results.items():
        assert f"  {name} " in printed
        assert row["rule"], row["shape"] == ("delta_net", SMALL)
        assert row["sizes"] == {"B": 1, "T": 5, "H": 2, "Hk": 1, "K": 3, "V": 2}
        assert set(row["errors"]) == {"o", "state"}
        assert 0 < row["error"] <= row["tolerance"] == TOLERANCES["float32"]
        assert row["errors"][row["worst"]] == row["error"] == max(row["errors"].values())
        low, high = row["quartile_seconds"]
        assert 0 < low <= row["median_seconds"] <= high
        assert min(row["compile_seconds"], row["temporary_bytes"], row["speed_up"]) > 0
        assert row["passed"]
        assert not row["gradient"]
    assert results["scan"]["speed_up"] == 1
    assert record["passed"]
    assert {"jax", "date", "cpu", "cpu_cores", "device", "command"} <= set(record["environment"])


def test_grad_checks_the_gradient_of_every_array(compare):
    status, _, results, _ = compare("--grad", "--implementations", "scan", rules="osdn")
    gradients = {f"d_{name}" for name in ("initial_state", "q", "k", "v", "beta", "log_forget", "initial")}
    assert status == 0
    assert results["scan"]["gradient"]
    assert set(results["scan"]["errors"]) == {"o", "state", "preconditioner"} | gradients


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_types_have_their_own_tolerance(compare, dtype):
    status, _, results, _ = compare("--implementations", "scan", "--dtypes", dtype)
    assert status == 0
    assert results["scan"]["tolerance"] == TOLERANCES[dtype]
    assert (results["scan"]["error"] > 1e-4) == (dtype == "bfloat16")


@pytest.mark.parametrize("relative", [3e-6, 3e-5, np.nan])
def test_an_error_beyond_its_tolerance_is_status_1_and_named(compare, monkeypatch, relative):
    monkeypatch.setitem(IMPLEMENTATIONS, "slip", altered(lambda out: out * jnp.asarray(1 + relative, out.dtype)))
    status, printed, results, record = compare("--implementations", "slip")
    wrong = not relative < TOLERANCES["float32"]
    assert status == wrong
    assert (f"delta_net {SMALL} float32 slip: error" in printed) == wrong
    assert (results["slip"]["passed"], record["passed"]) == (not wrong, not wrong)
    assert results["scan"]["passed"]


def test_a_wrong_gradient_alone_is_found_by_grad(compare, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "flat", altered(jax.lax.stop_gradient))
    assert compare("--implementations", "flat")[0] == 0
    status, printed, results, _ = compare("--implementations", "flat", "--grad")
    assert status == 1
    assert f"in {results['flat']['worst']} exceeds its tolerance of 1e-05" in printed
    assert results["flat"]["worst"].startswith("d_")
    assert results["flat"]["errors"]["d_q"] == 1
    assert results["flat"]["errors"]["o"] < TOLERANCES["float32"]


def test_a_registered_kernel_joins_by_itself(compare, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "kernel", IMPLEMENTATIONS["scan"])
    status, _, results, _ = compare()
    assert status == 0
    assert list(results) == ["scan", "chunk", "kernel", "auto"]


def test_brackets_in_a_reason_are_printed(compare, monkeypatch):
    install = "needs triton: pip install -e '.[triton]'"
    monkeypatch.setitem(IMPLEMENTATIONS, "kernel", Implementation(None, lambda call, options: install))
    assert install in compare("--implementations", "kernel")[1]


def test_an_implementation_that_cannot_run_says_why_and_fails_nothing(compare, monkeypatch, tmp_path):
    monkeypatch.setitem(IMPLEMENTATIONS, "kernel", Implementation(refused))
    picture = tmp_path / "p.png"
    status, printed, results, _ = compare("--implementations", "kernel", "--plot", str(picture))
    assert status == 0
    assert results["kernel"]["refusal"] == "needs a Hopper GPU, this is a toaster"
    assert f"delta_net {SMALL} float32 kernel: not served: needs a Hopper GPU, this is a toaster" in printed
    assert (results["kernel"]["median_seconds"], results["kernel"]["error"]) == (None, None)
    assert picture.exists()


def test_kernels_that_this_machine_does_not_run_are_a_row_each(compare):
    names = [name for name in KNOWN if name.startswith(("mosaic_gpu", "triton"))]
    status, printed, results, _ = compare("--implementations", *names, rules="osdn")
    assert status == 0
    for name in names:
        assert results[name]["refusal"].startswith(f"implementation {name!r}: ")
    assert "triton: not served: implementation 'triton': got a cpu, the kernels need an NVIDIA GPU" in printed


def test_a_program_that_does_not_fit_in_memory_is_not_run(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "available_bytes", lambda: 10)
    status, printed, results, _ = compare("--implementations", "scan", "--plot", str(tmp_path / "p.png"))
    assert status == 0
    assert "GB are free" in results["scan"]["refusal"]
    assert results["scan"]["temporary_bytes"] > 0
    assert "No picture" in printed


def test_a_reference_that_does_not_fit_in_memory_refuses_the_case(compare, monkeypatch):
    monkeypatch.setitem(judge.__globals__, "available_bytes", lambda: 10)
    status, printed, results, _ = compare("--grad")
    assert status == 0
    for name in ("scan", "chunk", "auto"):
        assert results[name]["refusal"].startswith(
            "the float64 scan to compare with needs 0.0 GB of memory where 0.0 GB"
        )
        assert f"delta_net {SMALL} float32 {name}: not served: the float64 scan" in printed


def test_a_program_that_runs_out_of_memory_is_a_refusal(compare, monkeypatch):
    real = measure._errors

    def errors(contender, expected):
        if contender.name == "chunk":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
        return real(contender, expected)

    monkeypatch.setattr(measure, "_errors", errors)
    status, _, results, _ = compare()
    assert status == 0
    assert results["chunk"]["refusal"] == "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    assert results["chunk"]["median_seconds"] is None
    assert results["auto"]["median_seconds"] > 0


def test_results_that_cannot_be_saved_are_shown(capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "x.json")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    flags = ["--implementations", "scan", "--repeats", "1", "--json", str(tmp_path / "x.json")]
    assert main(["--rules", "delta_net", "--shapes", SMALL, *flags]) == 2
    out, err = capsys.readouterr()
    assert "  scan " in out
    assert err.endswith("error: --json: [Errno 28] No space left on device: 'x.json'\n")


def test_other_errors_are_not_hidden(compare, monkeypatch):
    def broken(call, options):
        raise ValueError("a bug")

    monkeypatch.setitem(IMPLEMENTATIONS, "broken", Implementation(broken))
    with pytest.raises(ValueError, match="a bug"):
        compare("--implementations", "broken")


def test_programs_take_turns(monkeypatch):
    monkeypatch.setattr(measure, "_SHORTEST", 0.0)  # one call at a time
    calls = []
    running = [measure.Contender(name, (name,), compiled=calls.append) for name in "ab"]
    measure.take_turns(running, repeats=3)
    assert "".join(calls) == "aabb" + 3 * "aabb"  # each timed call follows one that is not timed
    assert [len(c.seconds) for c in running] == [3, 3]


def test_ratios_are_taken_within_a_round():
    assert ratio([1.0, 10.0, 2.0], [0.5, 5.0, 1.0]) == 2.0


# --- reference and inputs ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("rule", "gradient"), [("osdn_trust", True), ("pgdn", False)])
def test_the_reference_in_blocks_is_the_scan(rule, gradient):
    """Three blocks of two tokens, and a last one of one."""
    arrays = draw_inputs(rule, Shape(2, 7, 2, 1, 3, 2), "float64", seed=3)
    scan = program(rule, "scan")
    if gradient:
        cotangents = draw_cotangents(jax.eval_shape(scan, arrays), "float64", seed=3)
        want = jit(value_and_gradient(scan))(arrays, cotangents)
    else:
        cotangents, want = None, (jit(scan)(arrays), {})
    assert_close(judge(rule, arrays, cotangents), want, 1e-13)


@pytest.mark.parametrize("rule", COMPARED_RULES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_fit_their_rule_and_lie_in_the_papers_ranges(rule, dtype):
    shape = Shape(2, 64, 4, 2, 8, 6)
    arrays = draw_inputs(rule, shape, dtype, seed=1)
    again, other = (draw_inputs(rule, shape, dtype, seed=s) for s in (1, 2))
    outputs = jax.eval_shape(program(rule, "scan"), arrays)
    assert outputs["o"].shape == (2, 64, 4, 6)
    assert outputs["o"].dtype == arrays["q"].dtype == dtype
    assert outputs["state"].dtype == np.float32
    for name, x in arrays.items():
        np.testing.assert_array_equal(x, again[name])
        assert not np.array_equal(x, other[name])
        values = x.astype(np.float64)
        assert np.isfinite(values).all()
        if name in ("q", "k"):
            np.testing.assert_allclose(np.linalg.norm(values, axis=-1), 1, atol=1e-2)
        elif name.endswith("log_decay"):
            assert -30 < values.min() < values.max() < 0
        elif name == "log_forget":
            assert 0.995 < np.exp(values).mean() < 0.9995
        elif name.endswith("gate") or name == "gram_gain" or (name == "beta" and rule != "mamba2"):
            assert 0 < values.min() < values.max() < 1
        elif name == "initial":
            low, high = COMPARED_RULES[rule].options["bounds"]
            assert low <= values.min() < values.max() <= high


# --- command line ---------------------------------------------------------------------------------------------------


def test_the_package_imports_its_names_on_first_use():
    """So Ctrl-C is handled before JAX is imported."""
    code = "import sys, osdn_jax.compare; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
    assert all(hasattr(osdn_jax.compare, name) for name in osdn_jax.compare.__all__)
    assert set(osdn_jax.compare.__all__) <= set(dir(osdn_jax.compare))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        osdn_jax.compare.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rules", "delta_net,deltanet"], ["--rules", "'deltanet'", *COMPARED_RULES]),
        (
            ["--implementations", "scan", "cuda"],
            ["--implementations", "'cuda'", ", ".join(KNOWN)],
        ),
        (["--dtypes", "f32"], ["--dtypes", "'f32'", *TOLERANCES]),
        (["--shapes", "B1T4"], ["--shapes", "'B1T4'", "without H, K, V", "B1T4096H4D128"]),
        (["--shapes", "B1T4H1X2"], ["--shapes", "'X2'"]),
        (["--shapes", "B1T4H1D2K2"], ["--shapes", "either D or K and V"]),
        (["--shapes", "B1T4H1D2T8"], ["--shapes", "T twice"]),
        (["--shapes", "B1T0H1D2"], ["--shapes", "T = 0", "at least 1"]),
        (["--shapes", "B1T4H3Hk2D2"], ["--shapes", "multiple of Hk"]),
        (["--shapes", ""], ["--shapes", "''"]),
        (["--repeats", "0"], ["--repeats", "'0'", "at least 1"]),
        (["--seed", "-1"], ["--seed", "'-1'", "at least 0"]),
        (["--plot", "picture.pdf"], ["--plot", "'picture.pdf'", ".png"]),
        (["--json", "no/such/folder/x.json"], ["--json", "'no/such/folder'"]),
        (["--json", "."], ["--json", "'.'", "expected a file"]),
        (["--json", ""], ["--json", "''", "expected a file"]),
        (["--json", "a.png", "--plot", "a.png"], ["--plot", "'a.png'", "another file"]),
        (["--shapes", "B1T10000000000H64D128"], ["--shapes", "'B1T10000000000H64D128'", "GB of memory", "are free"]),
        (["--shapes", SMALL, "B1T1H1D10000000"], ["--shapes", "'B1T1H1D10000000'", "GB of memory"]),
        (["--shapes", "B1T4H1D2,B999999999999999T1H1D1"], ["'B999999999999999T1H1D1'", "GB of memory"]),
        (["--shapes", f"B1T{'9' * 5000}H1D1"], ["--shapes", "cannot read"]),
        (["--repeats", "9" * 5000], ["--repeats", "at least 1"]),
        (["--repeats", "nan"], ["--repeats", "'nan'", "at least 1"]),
        (["--rules", ""], ["--rules", "''"]),
        (["--gradient"], ["--gradient", "--grad", "--shapes"]),
        (["--rules"], ["--rules", "at least one"]),
    ],
)
def test_a_wrong_command_line_is_status_2_and_one_line(capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert [text for text in named if text not in err] == []


def test_help_names_what_there_is(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    known = f"{', '.join(KNOWN)} (default scan, chunk, auto)"
    for text in (*COMPARED_RULES, known, *TOLERANCES, "B1T4096H4D128"):
        assert text in out


def test_several_values_by_commas_and_spaces():
    a, b, c = Shape(1, 2, 4, 4, 8, 8), Shape(1, 2, 4, 2, 8, 6), Shape(3, 2, 1, 1, 8, 8)
    assert parse_shapes("B1T2H4D8,B=1,T=2,H=4,Hk=2,K=8,V=6,B3T2H1K8V8") == [a, b, c]


@given(st.lists(st.integers(1, 5000), min_size=6, max_size=6))
def test_a_shape_is_written_as_it_is_read(sizes):
    batch, length, groups, key_heads, key_dim, value_dim = sizes
    shape = Shape(batch, length, groups * key_heads, key_heads, key_dim, value_dim)
    assert parse_shapes(str(shape)) == [shape]
    assert parse_shapes(",".join(f"{k}={v}" for k, v in shape.sizes().items())) == [shape]


# --- output ----------------------------------------------------------------------------------------------------------


def test_numbers_have_three_digits_and_a_unit():
    assert [duration(x) for x in (None, 1.5e-7, 0.0123, 0.9999, 61.0)] == ["", "0.15 µs", "12.3 ms", "1.00 s", "61 s"]
    assert [size(x) for x in (0, 900, 30_700, 3_113_000_000)] == ["0 B", "900 B", "30.7 kB", "3.11 GB"]


@pytest.mark.parametrize("rule", COMPARED_RULES)
def test_the_bytes_of_inputs_are_known_before_they_are_drawn(rule):
    for shape in (Shape(3, 5, 4, 2, 7, 6), Shape(1, 1, 1, 1, 1, 1)):
        for dtype in TOLERANCES:
            drawn = draw_inputs(rule, shape, dtype, seed=0)
            assert input_bytes(rule, shape, dtype) == sum(x.nbytes for x in drawn.values())


def wide_results():
    """Yield rows with the longest values of every column."""
    for rule, shape in (("delta_net", "B1T1024H4D64"), ("os_gdn_trust", "B128T1048576H128Hk16K256V512")):
        for name in ("scan", "mosaic_gpu_interpret"):
            yield Result(
                *(rule, shape, {}, "bfloat16", name, True),
                **{"error": 1.2e-7, "worst": "d_initial_state", "tolerance": 1e-2},
                **{"compile_seconds": 1.234, "median_seconds": 0.123456, "quartile_seconds": (0.1114, 0.1345)},
                **{"temporary_bytes": 765432100, "speed_up": 1234.56},
            )
        yield Result(rule, shape, {}, "bfloat16", "mosaic_gpu", True, refusal="no GPU", compile_seconds=9.876)


@pytest.mark.parametrize("width", [40, 60, 72, 80, 100, 132])
def test_a_narrow_window_has_fewer_columns_and_all_digits(width):
    cells = {
        "error": "1.2e-07",
        "worst in": "d_initial_state",
        "compile": "1.23 s",
        "time": "123 ms",
        "quartiles": "111ms–134ms",
        "temporary": "765 MB",
        "speed-up": "1234.56 ×",
    }
    lines = result_table(list(wide_results()), width).plain.splitlines()
    header = lines[2]
    shown = [name for name in cells if name in header]
    assert {"error", "time"} <= set(shown)
    assert (shown == list(cells)) == (width == 132)
    rows = [line for line in lines if line.startswith("  ")]
    assert len(rows) == 6
    for row in rows:
        if "mosaic_gpu " in row:
            assert "not served" in row
        else:
            assert [cells[name] for name in shown] == re.findall(r"\S+(?: m?s| MB| ×)?", row)[1:]
    assert "…" not in "".join(lines)
    if width >= 60:
        assert max(map(len, [header, lines[3], *rows])) <= width
    left_out = [name for name in cells if name not in shown]
    said = [name for name in cells if name in lines[-1]] if left_out else []
    assert said == left_out


def test_the_variable_columns_sets_the_width_of_a_pipe(compare, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, printed, _, _ = compare("--grad", rules="osdn")
    assert max(map(len, printed.splitlines()[:10])) <= 80
    monkeypatch.delenv("COLUMNS")
    _, printed, _, _ = compare("--grad", rules="osdn")
    assert "quartiles" in printed


def measured(rule, implementation, length, seconds, count):
    sizes = {"B": 1, "T": length, "H": 1, "Hk": 1, "K": 8, "V": 8}
    about = (rule, f"B1T{length}H1D8", sizes, "float32", implementation, True)
    return Result(*about, median_seconds=seconds, temporary_bytes=count)


def test_the_picture_is_a_png_with_a_label_for_every_curve(tmp_path):
    rules = ("delta_net", "kda")
    results = [measured(r, i, t, 1e-5 * t, 100 * t) for r in rules for i in ("scan", "auto") for t in (64, 256)]
    results.append(measured("kda", "kernel", 64, None, None))  # not served
    plot_results(results, tmp_path / "p.png", title="Title", note="Note")
    data = (tmp_path / "p.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(data[i : i + 4]) for i in (16, 20)] == [1500, 675]
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_results(results[-1:], tmp_path / "q.png", title="Title")
    assert not (tmp_path / "q.png").exists()
