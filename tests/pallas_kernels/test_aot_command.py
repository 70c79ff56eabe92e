"""`python -m pallas_kernels.aot` with given outcomes: judged by the record, printed, written and returned."""

import json

import pytest

from pallas_kernels.aot import __main__ as command
from pallas_kernels.aot import compiler, record
from pallas_kernels.aot.assembler import parse
from pallas_kernels.aot.cases import all_cases, matching
from pallas_kernels.aot.compiler import Outcome
from pallas_kernels.aot.record import Record
from support.aot import BOUNDS, NAME, NVJITLINK, outcome_of

BUDGET = Record(spills={NAME: {"a": 8}})
LIMIT = Record(limits={NAME: "too large"})


@pytest.mark.parametrize(
    ("known", "outcome", "problems", "improvements"),
    [
        (Record(), outcome_of(0), 0, 0),
        (Record(), outcome_of(4), 1, 0),
        (BUDGET, outcome_of(8), 0, 0),
        (BUDGET, outcome_of(12), 1, 0),
        (BUDGET, outcome_of(0, 12, 0), 1, 0),  # a program may hold a kernel in several forms
        (BUDGET, outcome_of(4), 0, 1),
        (Record(), outcome_of(status="refused", message="too large"), 1, 0),
        (LIMIT, outcome_of(status="refused", message="too large"), 0, 0),
        (LIMIT, outcome_of(status="refused", message="too small"), 1, 0),
        (LIMIT, outcome_of(0), 0, 1),
        (LIMIT, outcome_of(status="failed", message="no"), 1, 0),
    ],
)
def test_outcomes_are_judged_by_the_record(known, outcome, problems, improvements):
    assert len(known.problems(outcome)) == problems
    assert len(known.improvements(outcome)) == improvements


def test_a_run_can_be_recorded(tmp_path, monkeypatch):
    outcomes = [outcome_of(0, 8), Outcome("b", "refused", message="too large"), Outcome("c", "failed", message="no")]
    file = tmp_path / "record.json"
    monkeypatch.setattr(record, "FILE", file)
    record.save(file, outcomes, {"jax": "1.2.3"})
    known = record.load()
    assert known == Record(versions={"jax": "1.2.3"}, spills={NAME: {"a": 8}}, limits={"b": "too large"})
    assert [bool(known.problems(outcome)) for outcome in outcomes] == [False, False, True]


def test_the_record_is_about_cases_that_there_are():
    known = record.load()
    names = {case.name for case in all_cases()}
    assert known.spills.keys() | known.limits.keys() <= names
    assert all(spill > 0 for spills in known.spills.values() for spill in spills.values())
    assert {"jax", "jaxlib"} <= known.versions.keys()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command line with given outcomes: (exit status, stdout, JSON data, Markdown page)."""

    def run(outcomes, *flags, known=Record()):  # noqa: B008 (it is immutable)
        monkeypatch.setattr(compiler, "has_plugin", lambda: True)
        monkeypatch.setattr(compiler, "prepare_environment", lambda: None)
        monkeypatch.setattr(compiler, "versions", lambda: {"jax": "1.2.3"})
        monkeypatch.setattr(record, "load", lambda: known)
        monkeypatch.setattr(command, "compile_cases", lambda cases, gpu, jobs: iter(outcomes))
        files = tmp_path / "a.json", tmp_path / "a.md"
        status = command.main(["--json", str(files[0]), "--markdown", str(files[1]), *flags])
        return status, capsys.readouterr().out, json.loads(files[0].read_text()), files[1].read_text()

    return run


def test_a_run_that_is_as_recorded(run):
    status, out, data, page = run([outcome_of(8)], "--gpu", "h100", known=BUDGET)
    assert status == 0
    assert "H100" in out
    assert "1 cases, 1 kernels: all as recorded." in out
    (row,) = [line.split() for line in out.splitlines() if "1,024" in line]
    assert [word for word in row if word != "│"] == ["a", "9", "8", "0", "1,024", "16", "0"]
    assert (data["gpu"], data["versions"]) == ("h100", {"jax": "1.2.3"})
    (kernel,) = data["cases"][0]["kernels"]
    assert (kernel["spill_stores"], kernel["threads"], kernel["blocks"]) == (8, 128, 16)
    assert data["command"].startswith("python -m pallas_kernels.aot --json ")
    assert f"| {NAME} | a | 9 | 8 | 0 | 1,024 | 16 | 0 |  | ok |" in page


@pytest.mark.parametrize(
    ("outcome", "result", "message"),
    [
        (outcome_of(9), "over budget", "a spills 9 bytes, its budget is 8"),
        (outcome_of(status="refused", message="too large"), "refused", "refused: too large"),
        (outcome_of(status="failed", message="ValueError: no [red]"), "failed", "ValueError: no [red]"),
    ],
)
def test_a_run_in_which_something_is_wrong(run, outcome, result, message):
    status, out, _, page = run([outcome_of(0), outcome], known=BUDGET)
    assert status == 1
    assert f"wrong: {NAME}: {message}" in out
    assert f" {result} " in out
    assert f"| {result} |" in page
    assert "1 wrong." in out


def test_a_known_limit_is_shown_and_passes(run):
    status, out, _, page = run([outcome_of(status="refused", message="too large")], known=LIMIT)
    assert status == 0
    assert "known limit" in out
    assert "known limit" in page


def test_remarks_are_counted_and_told(run):
    outcome = Outcome(NAME, "compiled", kernels=parse(NVJITLINK) * 2)
    _, out, data, page = run([outcome], known=Record(spills={NAME: {"a": 300}}))
    assert f"2 × the assembler: {BOUNDS}" in out
    assert f"- 2 × {BOUNDS}" in page
    assert f"better: {NAME}: a spills 260 bytes of the 300 recorded" in out
    assert data["cases"][0]["kernels"][0]["remarks"] == [BOUNDS]


def test_budgets_of_other_versions_are_said_to_be_so(run):
    _, out, _, _ = run([outcome_of(0)], known=Record(versions={"jax": "1.2.2"}))
    assert "The budgets were taken with jax 1.2.2; here is jax 1.2.3." in out
    _, out, _, _ = run([outcome_of(0)], known=Record(versions={"jax": "1.2.3"}))
    assert "budgets" not in out


def test_without_the_plugin_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "PLUGINS", ("jax_plugins.no_such_plugin", "no_such_package.plugin"))
    assert command.main([]) == 2
    assert 'pip install "jax[cuda13]"' in capsys.readouterr().err


def test_the_list_needs_no_plugin(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "PLUGINS", ())
    assert command.main(["--list", "--cases", "hypergradient"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in matching("hypergradient")]


@pytest.mark.parametrize(
    "flags",
    [
        ["--gpu", "a100"],
        ["--cases", "no such case"],
        ["--jobs", "0"],
        ["--json", "/no/such/folder/a.json"],
        ["--record", "--cases", "forward"],
    ],
)
def test_a_wrong_command_line_names_the_flag(flags, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(flags)
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert flags[0] in err
    assert err.count("\n") == 1
