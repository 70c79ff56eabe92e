"""`python -m triton_kernels.aot` with given outcomes: spills in loops, the record, the report, the command line."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from triton_kernels.aot import __main__ as command
from triton_kernels.aot import compiler, record, results, sass
from triton_kernels.aot.cases import all_cases, fills_the_gpu, matching
from triton_kernels.aot.compiler import Kernel, Outcome
from triton_kernels.aot.gpus import GPUS
from triton_kernels.aot.launches import Trace, Use
from triton_kernels.aot.record import Record
from triton_kernels.aot.results import Result
from triton_kernels.aot.specialization import Specialization
from triton_kernels.common.cards import capability_of

CASE = "delta_rule/gradient/scalar/K64V64/B1H2/T32768"
KERNEL = Kernel(200, 8, 12, 0, 4, 1024, 128, 1.5)
SPECIALIZATION = Specialization("a.b", "solve", (("x", "*bf16"), ("n", "i32")), (("K", 64), ("ERASE", True)), 4, 1)
LABEL = "solve bf16 K=64 ERASE, 4 warps, 1 stage"

# As nvdisasm prints it, shortened: a loop at .L_x_1, a subroutine that the loop calls, and code after a jump out of it.
LOOP = """
.text.kernel:
        /*0000*/                   STL [R1], R6 ;
        /*0010*/              @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   {IN_LOOP} ;
        /*0030*/                   CALL.REL.NOINC `($kernel$slowpath) ;
        /*0040*/             @!P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   LDL.LU R5, [R1+0x4] ;
.L_x_3:
        /*0070*/                   LDL.64 R4, [R1] ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4);
$kernel$slowpath:
        /*00a0*/                   {IN_CALL} ;
        /*00b0*/                   RET.REL.NODEC R4 `(kernel) ;
"""


@pytest.mark.parametrize(
    ("in_loop", "in_call", "spills"),
    [
        ("FADD R1, R2, R3", "NOP", (0, 3)),
        ("LDL R1, [R1]", "NOP", (1, 3)),
        ("FADD R1, R2, R3", "STL.64 [R1], R2", (1, 3)),
        ("@P2 STL [R1+0x10], R2", "LDL R2, [R1]", (2, 3)),
    ],
)
def test_spills_are_found_in_loops(in_loop, in_call, spills):
    assert sass.spills(LOOP.replace("{IN_LOOP}", in_loop).replace("{IN_CALL}", in_call)) == spills


def test_a_jump_backward_into_code_that_is_left_is_no_loop():
    """The assembler places rare code after the end; the jump back from there spans code that runs once."""
    code = """
        /*0000*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   EXIT ;
.L_x_2:
        /*0030*/                   LDL R2, [R1] ;
        /*0040*/                   BRA `(.L_x_1) ;
"""
    assert sass.spills(code) == (0, 2)


def test_a_jump_as_a_call_closes_a_loop():
    """Seen on compute capability 8.0: a conditional call leaves the loop, and the branch after it repeats it."""
    code = """
.L_x_2:
        /*0000*/                   LDL R2, [R1] ;
        /*0010*/              @!P5 CALL.REL.NOINC `(.L_x_1) ;
        /*0020*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/                   STL [R1], R2 ;
        /*0040*/                   EXIT ;
"""
    assert sass.spills(code) == (1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no code", "got no machine code"),
        ("        /*0000*/                   BRX R2 -0x10 ;", "got BRX"),
        ("        /*0000*/                   BRA `(.L_x_9) ;", "expected a label"),
    ],
)
def test_code_that_cannot_be_judged_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sass.spills(text)


def test_the_list_of_cases():
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))
    assert matching("hypergradient/gradient/K64")
    for size in (64, 128):
        for decay in ("none", "scalar", "channel"):
            for direction in ("forward", "gradient"):
                assert len(matching(f"delta_rule/{direction}/{decay}/K{size}V{size}/*bfloat16")) >= 4
    assert sum(map(fills_the_gpu, all_cases())) == 10
    for name in ("delta_rule/gradient/*", "hypergradient/gradient/", "gram/gradient/"):
        for size in (32, 256):
            assert matching(f"{name}K{size}")


def test_the_gpus_are_those_that_jax_names():
    for gpu in GPUS.values():
        assert capability_of(SimpleNamespace(platform="gpu", device_kind=gpu.device_kind)) == gpu.capability


def test_a_kernel_is_told_by_what_it_is_compiled_for():
    assert SPECIALIZATION.label == LABEL
    assert SPECIALIZATION._replace(stages=2, constants=(("X", None),)).label == "solve bf16, 4 warps, 2 stages"


@pytest.mark.parametrize(
    ("changes", "uses", "problems"),
    [
        ({}, [], 0),
        ({"in_loops": 2}, [], 1),
        ({"outside": 99, "spill_loads": 99}, [], 0),
        ({"seconds": 10.5}, [], 1),
        ({"shared_memory": 101377}, [], 1),
        ({"shared_memory": 101376}, [], 0),
        ({}, [Use(CASE, 127, must_fill=True)], 1),
        ({}, [Use(CASE, 128, must_fill=True), Use(CASE, 1)], 0),
        ({"seconds": 10.5, "in_loops": 2}, [], 2),
    ],
)
def test_limits_of_a_kernel(changes, uses, problems):
    result = Result(LABEL, uses, Outcome(dataclasses.replace(KERNEL, **changes)))
    assert len(Record().problems(result, "rtx4090", GPUS["rtx4090"])) == problems


def test_a_recorded_spill_is_a_budget_on_its_gpu():
    known = Record(spills={"a100": {LABEL: {"instructions": 2, "reason": "why"}}})
    judged = lambda count, gpu: (
        known.problems(
            result := Result(LABEL, [], Outcome(dataclasses.replace(KERNEL, in_loops=count))), gpu, GPUS[gpu]
        ),
        known.improvements(result, gpu),
    )
    assert judged(2, "a100") == ([], [])
    assert judged(3, "a100")[0] == ["3 spill instructions in loops, its budget is 2"]
    assert judged(1, "a100") == ([], ["1 spill instructions in loops of the 2 recorded"])
    assert len(judged(2, "h100")[0]) == 1


def test_a_run_can_be_recorded(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    monkeypatch.setattr(record, "FILE", file)
    old = {LABEL: {"instructions": 9, "reason": "why"}}
    file.write_text(json.dumps({"versions": {}, "spills": {"a100": old, "h100": old}, "refusals": {"x": "y"}}))
    spills = dataclasses.replace(KERNEL, in_loops=3)
    found = [
        Result(LABEL, [], Outcome(spills)),
        Result("new", [], Outcome(spills)),
        Result("none", [], Outcome(KERNEL)),
    ]
    record.save(file, found, "a100", {"triton": "1.2.3"}, {CASE: "too large"})
    entries = {LABEL: {"instructions": 3, "reason": "why"}, "new": {"instructions": 3, "reason": ""}}
    assert record.load() == Record({"triton": "1.2.3"}, {"a100": entries, "h100": old}, {CASE: "too large"})


def test_the_record_has_reasons_and_known_names():
    known = record.load()
    assert known.spills.keys() <= GPUS.keys()
    assert known.refusals.keys() <= {case.name for case in all_cases()}
    for entries in known.spills.values():
        assert all(entry["instructions"] > 0 and entry["reason"] for entry in entries.values())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs the command line with given outcomes: (exit status, stdout, JSON data, Markdown page)."""

    def run(outcomes, *flags, traces=None, known=Record()):  # noqa: B008 (it is immutable)
        monkeypatch.setattr(compiler, "missing", lambda: None)
        monkeypatch.setattr(compiler, "prepare_environment", lambda: None)
        monkeypatch.setattr(compiler, "versions", lambda: {"triton": "1.2.3"})
        monkeypatch.setattr(record, "load", lambda: known)
        kernels = [SPECIALIZATION._replace(module=f"m{i}") for i in range(len(outcomes))]
        launched = [(kernel, Use(CASE, 512, must_fill=True)) for kernel in kernels]
        monkeypatch.setattr(results, "traces", lambda *_: iter(traces or [Trace(CASE, launched)]))
        monkeypatch.setattr(results, "in_workers", lambda *_: iter(outcomes))
        files = tmp_path / "a.json", tmp_path / "a.md"
        status = command.main(["--json", str(files[0]), "--markdown", str(files[1]), *flags])
        return status, capsys.readouterr().out, json.loads(files[0].read_text()), files[1].read_text()

    return run


def test_a_run_within_the_limits(run):
    status, out, data, page = run([Outcome(KERNEL), Outcome(KERNEL)], "--gpu", "rtx3090")
    assert status == 0
    assert "RTX3090" in out
    assert "1 cases, 2 kernels: all within their limits." in out
    assert f"| {LABEL} | 200 | 8 | 12 | 0 | 1,024 | 2 | 1.5 | 1 | ok |" in page
    assert f"| {LABEL} (2) | 200" in page
    assert (data["gpu"], data["versions"]) == ("rtx3090", {"triton": "1.2.3"})
    (kernel, _) = data["kernels"]
    assert kernel["outcome"]["kernel"]["blocks"] == 2
    assert kernel["uses"] == [{"case": CASE, "programs": 512, "must_fill": True}]
    assert data["command"].startswith("python -m triton_kernels.aot --json ")


@pytest.mark.parametrize(
    ("outcome", "result", "message"),
    [
        (Outcome(dataclasses.replace(KERNEL, in_loops=1)), "over its limits", "1 spill instructions in loops"),
        (Outcome(dataclasses.replace(KERNEL, seconds=11)), "over its limits", "takes 11.0 s of CPU to compile"),
        (
            Outcome(dataclasses.replace(KERNEL, shared_memory=200000)),
            "over its limits",
            "needs 200,000 bytes of shared memory, a block may have 166,912",
        ),
        (Outcome(message="ValueError: no [red]"), "failed", "ValueError: no [red]"),
    ],
)
def test_a_run_in_which_something_is_wrong(run, outcome, result, message):
    status, out, data, page = run([outcome])
    assert status == 1
    assert f"wrong: {LABEL}: {message}" in out
    assert f"| {result} |" in page
    assert "1 kernels: 1 problem." in out
    assert data["kernels"][0]["problems"]


def test_a_case_that_is_refused_fails_unless_that_is_recorded(run):
    traces = [Trace(CASE, status="refused", message="too large")]
    status, out, data, _ = run([], traces=traces)
    assert status == 1
    assert f"wrong: {CASE}: refused: too large" in out
    assert data["not_compiled"] == {CASE: "too large"}
    assert run([], traces=traces, known=Record(refusals={CASE: "too large"}))[0] == 0
    status, out, *_ = run([Outcome(KERNEL)], known=Record(refusals={CASE: "too large"}))
    assert status == 0
    assert f"better: {CASE}: no longer refused" in out


def test_a_record_of_other_versions_is_said_to_be_so(run):
    _, out, *_ = run([Outcome(KERNEL)], known=Record(versions={"triton": "1.2.2"}))
    assert "The record was taken with triton 1.2.2; here is triton 1.2.3." in out


@pytest.mark.parametrize(
    "flags",
    [
        ["--gpu", "v100"],
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


def test_what_the_process_lacks_is_said(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as error:
        command.main([])
    assert error.value.code == 2
    assert "TRITON_INTERPRET=1: unset it" in capsys.readouterr().err
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert "make aot-triton" in compiler.missing()


def test_the_list_needs_no_triton(monkeypatch, capsys):
    monkeypatch.setattr(compiler, "missing", lambda: "no")
    assert command.main(["--list", "--cases", "hypergradient"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in matching("hypergradient")]
