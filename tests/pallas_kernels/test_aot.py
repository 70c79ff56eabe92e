"""`python -m pallas_kernels.aot`, all but the compiler: what is read, judged, printed and returned."""

import dataclasses
import fnmatch
import json
import os
import re
import tomllib
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from importlib import resources
from pathlib import Path

import jax
import pytest

from pallas_kernels.aot import __main__ as command
from pallas_kernels.aot import compiler, occupancy, record, workers
from pallas_kernels.aot.assembler import Kernel, of_program, parse
from pallas_kernels.aot.cases import Case, all_cases, matching
from pallas_kernels.aot.compiler import Outcome, compile_case
from pallas_kernels.aot.programs import BATCH, HEADS, program, splits
from pallas_kernels.aot.record import Record

ROOT = Path(__file__).parent.parent.parent
BOUNDS = "Potential out of bound access while accessing symbol '__dynamic_shmem__0' of type '.b8'."
SERIAL = "(C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized in the function 'b'"
# As jaxlib 0.11 prints it, and below as 0.12 does. The host's code, in between, is cut down to what matters.
PTXAS = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'delta_rule_recur_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for delta_rule_recur_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 222 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 89.420 ms

declare i32 @mosaic_gpu_launch_kernel(ptr, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, i32, ptr, ptr)
  %726 = call i32 @mosaic_gpu_launch_kernel(ptr %0, i32 1, i32 2, i32 2, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, \
i32 183312, i32 0, ptr %1, ptr %719)
ptxas tempfile-1, line 505; info    : {BOUNDS}
ptxas warning : Registers are spilled to local memory in function 'b', 236 bytes spill stores, 244 bytes spill loads
ptxas info    : Compiling entry function 'delta_rule_recur_back_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for delta_rule_recur_back_mosaic_gpu_kernel
    240 bytes stack frame, 236 bytes spill stores, 244 bytes spill loads
ptxas info    : {SERIAL}
ptxas info    : Used 255 registers, used 2 barriers, 240 bytes cumulative stack size, 1 bytes smem
"""
NVJITLINK = f"""
ptxas application ptx input, line 536; info    : {BOUNDS}
ptxas warning : Registers are spilled to local memory in function 'a', 260 bytes spill stores, 260 bytes spill loads
ptxas info    : Compiling entry function 'a_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for a_mosaic_gpu_kernel
ptxas         .     264 bytes stack frame, 260 bytes spill stores, 260 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 17 bytes smem
info    : Function properties for 'a_mosaic_gpu_kernel':
info    : used 255 registers, used 2 barriers, 264 stack, 1025 bytes smem, 2112 bytes cmem[0], 0 bytes lmem
 \0
  call void @mosaic_gpu_build_kernel_spec(ptr %0, i32 1, i32 2, i32 8, i32 0, i32 0, i32 0, i32 128, i32 1, i32 1, \
i32 126984, i32 0, i32 1, ptr %1077, ptr %1079)
"""
CASE = Case("delta_rule", True, 128, 128, "scalar")
NAME = "delta_rule/gradient/scalar/K128V128/bfloat16"


def test_the_assembler_of_the_path_is_read():
    recur, back = parse(PTXAS)
    launch = {"grid": (1, 2, 2), "block": (128, 1, 1), "shared_memory": 183312}
    assert recur == Kernel("delta_rule_recur", registers=222, barriers=2, **launch)
    assert recur.threads == 128
    assert back == Kernel(
        "delta_rule_recur_back",
        registers=255,
        stack=240,
        spill_stores=236,
        spill_loads=244,
        barriers=2,
        remarks=[BOUNDS, SERIAL],
    )
    assert back.spill == 244
    assert (recur.blocks, back.blocks) == (1, None)  # nothing tells how the second is launched


def test_the_assembler_in_jaxlib_is_read():
    (kernel,) = parse(NVJITLINK)
    launch = {"grid": (1, 2, 8), "block": (128, 1, 1), "shared_memory": 126984}
    assert kernel == Kernel("a", 255, 264, 260, 260, barriers=2, **launch, remarks=[BOUNDS])
    assert kernel.threads == 128


def test_a_remark_belongs_to_the_next_kernel_once_one_is_launched():
    first, second = parse(NVJITLINK + f"ptxas info : {SERIAL}" + NVJITLINK.replace("'a_", "'b_"))
    assert (first.remarks, second.remarks) == ([BOUNDS], [SERIAL, BOUNDS])


@pytest.mark.parametrize(
    ("registers", "threads", "shared_memory", "expected"),
    [
        (255, 128, 66576, 2),  # the registers decide
        (168, 128, 0, 3),
        (169, 128, 0, 2),  # given out in eights
        (200, 32, 0, 8),  # ten warps' worth, but only two in each of four partitions
        (64, 128, 77832, 2),  # shared memory decides
        (64, 128, 115712, 2),
        (64, 128, 115713, 1),
        (64, 128, 232448, 1),
        (64, 128, 232449, 0),  # more than a block may have
        (32, 1024, 0, 2),  # as many warps as there may be
        (32, 65, 0, 21),
        (32, 32, 0, 32),  # as many blocks
        (255, 1024, 0, 0),
    ],
)
def test_blocks_of_a_multiprocessor(registers, threads, shared_memory, expected):
    assert occupancy.blocks(registers, threads, shared_memory) == expected
    kernel = Kernel("a", registers=registers, block=(threads, 1, 1), shared_memory=shared_memory)
    assert kernel.blocks == expected


@pytest.mark.parametrize(
    ("grid", "block", "refusals"),
    [
        ((2**31 - 1, 65535, 65535), (1024, 1, 1), []),
        ((2**31, 1, 1), (128, 1, 1), ["a has 2,147,483,648 blocks along x, a launch takes at most 2,147,483,647"]),
        ((1, 65536, 1), (128, 1, 1), ["a has 65,536 blocks along y, a launch takes at most 65,535"]),
        (
            (1, 1, 65536),
            (128, 1, 65),
            [
                "a has 65,536 blocks along z, a launch takes at most 65,535",
                "a has 65 threads along z, a launch takes at most 64",
            ],
        ),
        (None, None, []),
    ],
)
def test_a_launch_beyond_the_limits_is_wrong(grid, block, refusals):
    kernel = Kernel("a", grid=grid, block=block)
    assert kernel.refusals == refusals
    assert Record().problems(Outcome(NAME, "compiled", kernels=[kernel])) == refusals


def kernel_grids(jaxpr):
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(list(eqn.params.values())):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "grid_names"):
                yield tuple(value.grid)
            elif hasattr(value, "eqns"):
                yield from kernel_grids(value)


@pytest.mark.parametrize("case", matching("/T"), ids=lambda case: case.name)
def test_the_grid_of_every_kernel_is_one_axis(case):
    """CUDA takes 65,535 blocks along the others, and a launch of more ends the process."""
    function, arguments = program(case)
    grids = list(kernel_grids(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert {len(grid) for grid in grids} == {1}
    assert max(grids)[0] > 65535


@pytest.mark.parametrize("case", [case for case in all_cases() if case.sharded], ids=lambda case: case.name)
def test_a_program_for_two_gpus_is_split_along_its_batch_or_its_heads(case):
    _, arguments = program(case)
    specs = splits(case, arguments, "x")
    sizes = [
        x.shape[tuple(spec).index("x")]
        for x, spec in zip(*map(jax.tree.leaves, (arguments, specs)), strict=True)
        if "x" in tuple(spec)
    ]
    assert set(sizes) <= ({BATCH} if case.sharded == "batch" else {HEADS, HEADS // 2})
    assert len(sizes) >= 4


def test_nothing_is_read_from_nothing():
    assert parse("Used 3 registers\nwarning: nothing\n") == []


def test_cases_have_names_of_their_own_and_are_found_by_them():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert NAME in names
    assert [case.name for case in matching(NAME)] == [NAME]
    assert matching("") == all_cases()
    assert {case.key_dim for case in matching("forward/channel/K64*")} == {64}
    assert matching("no such case") == []


def test_cases_cover_what_the_functions_take():
    cases, functions = all_cases(), ("delta_rule", "hypergradient", "gram")
    sizes = {(64, 64), (128, 128), (256, 256), (64, 256), (256, 64), (128, 256)}
    for gradient in (False, True):
        for decay in ("scalar", "channel"):
            assert sizes <= {(c.key_dim, c.value_dim) for c in cases if (c.gradient, c.decay) == (gradient, decay)}
        assert {"none", "scalar", "channel"} <= {case.decay for case in cases if case.gradient == gradient}
    options = {option for case in cases for option in case.options}
    assert options == {"no-erase", "documents", "grouped", "write-key", "forget", "bounds", "multiply"}
    assert {case.dtype for case in cases if case.function == "delta_rule"} == {"bfloat16", "float16"}
    assert {(case.function, case.length) for case in cases if case.mapped} >= {("delta_rule", 2**14), ("gram", 2**14)}
    every = {
        (name, gradient, split) for name in functions for gradient in (False, True) for split in ("batch", "heads")
    }
    assert every == {(case.function, case.gradient, case.sharded) for case in cases if case.sharded}


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_a_case_is_a_program(case):
    function, arguments = program(case)
    assert callable(function)
    shapes = [x.shape for x in jax.tree.leaves(arguments)]
    assert any(case.key_dim in shape for shape in shapes)
    assert case.value_dim is None or any(case.value_dim in shape for shape in shapes)
    assert ("documents" in case.options) == any(x.dtype == bool for x in jax.tree.leaves(arguments))


@pytest.mark.parametrize("name", ["forward/none/K64V64/bf", "gradient/none/K64V64/bf"])
def test_a_program_traces(name):
    (case,) = matching(name)
    function, arguments = program(case)
    (results,) = [jax.eval_shape(function, *arguments)]
    wanted = arguments[0] if case.gradient else {"out": arguments[0]["v"], "state": arguments[0]["initial_state"]}
    assert [x.shape for x in jax.tree.leaves(results)] == [x.shape for x in jax.tree.leaves(wanted)]


def _call(name, identity):
    return (
        f'%x = bf16[2] custom-call(%y), custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(f)/jvp()/{name}/'
        f'mpmd_map" stack_frame_id=2}}, backend_config={{kernel_hash = "{identity}", module = "ML\\EF"}}\n'
    )


def test_kernels_are_found_by_their_code():
    forward, again, other = Kernel("prepare", 1), Kernel("prepare", 2), Kernel("walk", 3)
    known = {}
    text = _call("prepare", r"\22\\") + _call("walk", "w") + _call("prepare", "p") + _call("walk", "w")
    assert of_program(text, [other, forward, again], known) == [forward, other, again]
    # What has been compiled is not printed again.
    assert of_program(_call("prepare", "p") + _call("new", "n"), [Kernel("new")], known) == [again, Kernel("new")]
    with pytest.raises(LookupError, match="no kernel in the program"):
        of_program('custom_call_target="other"', [], known)
    with pytest.raises(LookupError, match="printed nothing of walk"):
        of_program(_call("walk", "new"), [forward], known)


def test_a_kernel_of_several_gpus_is_found_by_the_name_in_its_code():
    call = _call("jit(f)", "hash").replace(
        r'"ML\EF"', r'"ML\EF\00stable_mosaic_gpu\00\22\00delta_rule_recur_mosaic_gpu\00"'
    )
    recur = Kernel("delta_rule_recur", 1)
    assert of_program(call, [Kernel("gram", 2), recur], {}) == [recur]


def _prints(text, error=None):
    def compile_(case, gpu):
        os.write(1, text.encode())
        os.write(2, b"a note\n")
        if error is not None:
            raise error
        return _call("a", "hash")

    return compile_


def test_what_the_compiler_prints_is_caught(monkeypatch, capfd):
    monkeypatch.setattr(compiler, "_KNOWN", {})
    monkeypatch.setattr(compiler, "_compile", _prints(NVJITLINK))
    outcome = compile_case(CASE, "h200")
    assert dataclasses.replace(outcome, seconds=0.0) == Outcome(NAME, "compiled", kernels=parse(NVJITLINK))
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("after\n", "")


@pytest.mark.parametrize(
    ("text", "error", "status", "message"),
    [
        (NVJITLINK, NotImplementedError("decay: got none"), "refused", "decay: got none"),
        (NVJITLINK, ValueError("too much"), "failed", "ValueError: too much"),
        ("", None, "failed", "the assembler printed nothing of a"),
    ],
)
def test_what_goes_wrong_is_told(monkeypatch, text, error, status, message):
    monkeypatch.setattr(compiler, "_KNOWN", {})
    monkeypatch.setattr(compiler, "_compile", _prints(text, error))
    outcome = compile_case(CASE, "h200")
    assert (outcome.status, outcome.message) == (status, message)


class _Pool:
    """A pool of one process, which does not survive a K of 256."""

    made = 0

    def __init__(self, workers, mp_context):
        type(self).made += 1
        self.broken = False

    def submit(self, function, case, gpu):
        future = Future()
        self.broken |= case.key_dim == 256
        if self.broken:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(Outcome(case.name, "compiled"))
        return future

    def shutdown(self):
        pass


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_compiler_that_dies_takes_one_case_with_it(monkeypatch, jobs):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(_Pool, "made", 0)
    cases = [Case("delta_rule", True, size, size, "none") for size in (64, 256, 128, 64)]
    outcomes = list(workers.compile_cases(cases, "h200", jobs))
    assert [outcome.name for outcome in outcomes] == [case.name for case in cases]
    assert [outcome.status for outcome in outcomes] == ["compiled", "failed", "compiled", "compiled"]
    assert outcomes[1].message == "the compiler ended its process"
    assert _Pool.made == jobs + 1


def _outcome(*spills, status="compiled", message=""):
    kernels = [Kernel("a", registers=9, spill_stores=spill, block=(128, 1, 1), shared_memory=1024) for spill in spills]
    return Outcome(NAME, status, kernels=kernels, message=message)


BUDGET = Record(spills={NAME: {"a": 8}})
LIMIT = Record(limits={NAME: "too large"})


@pytest.mark.parametrize(
    ("known", "outcome", "problems", "improvements"),
    [
        (Record(), _outcome(0), 0, 0),
        (Record(), _outcome(4), 1, 0),
        (BUDGET, _outcome(8), 0, 0),
        (BUDGET, _outcome(12), 1, 0),
        (BUDGET, _outcome(0, 12, 0), 1, 0),  # a kernel may be there in several forms
        (BUDGET, _outcome(4), 0, 1),
        (Record(), _outcome(status="refused", message="too large"), 1, 0),
        (LIMIT, _outcome(status="refused", message="too large"), 0, 0),
        (LIMIT, _outcome(status="refused", message="too small"), 1, 0),
        (LIMIT, _outcome(0), 0, 1),
        (LIMIT, _outcome(status="failed", message="no"), 1, 0),
    ],
)
def test_outcomes_are_judged_by_the_record(known, outcome, problems, improvements):
    assert len(known.problems(outcome)) == problems
    assert len(known.improvements(outcome)) == improvements


def test_a_run_can_be_recorded(tmp_path, monkeypatch):
    outcomes = [_outcome(0, 8), Outcome("b", "refused", message="too large"), Outcome("c", "failed", message="no")]
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
    """Runs the command line with given outcomes: (exit status, what it printed, the data, the page)."""

    def run(outcomes, *flags, known=Record()):  # noqa: B008 (it does not change)
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
    status, out, data, page = run([_outcome(8)], "--gpu", "h100", known=BUDGET)
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
        (_outcome(9), "over budget", "a spills 9 bytes, its budget is 8"),
        (_outcome(status="refused", message="too large"), "refused", "refused: too large"),
        (_outcome(status="failed", message="ValueError: no [red]"), "failed", "ValueError: no [red]"),
    ],
)
def test_a_run_in_which_something_is_wrong(run, outcome, result, message):
    status, out, _, page = run([_outcome(0), outcome], known=BUDGET)
    assert status == 1
    assert f"wrong: {NAME}: {message}" in out
    assert f" {result} " in out
    assert f"| {result} |" in page
    assert "1 wrong." in out


def test_a_known_limit_is_shown_and_passes(run):
    status, out, _, page = run([_outcome(status="refused", message="too large")], known=LIMIT)
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
    _, out, _, _ = run([_outcome(0)], known=Record(versions={"jax": "1.2.2"}))
    assert "The budgets were taken with jax 1.2.2; here is jax 1.2.3." in out
    _, out, _, _ = run([_outcome(0)], known=Record(versions={"jax": "1.2.3"}))
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
    assert flags[0] in capsys.readouterr().err


def test_the_environment_has_its_own_assembler_first(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch()
    (tmp_path / "nvidia" / "cu13").mkdir(parents=True)
    (tmp_path / "nvidia" / "cu13" / "bin").symlink_to(tmp_path / "bin")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    compiler.prepare_environment()
    assert os.environ["PATH"] == f"{tmp_path}/nvidia/cu13/bin:/bin"
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"


def test_the_descriptions_are_of_the_gpus_that_they_are_named_after():
    assert compiler.targets() == ["h100", "h200"]
    for name in compiler.targets():
        text = (resources.files("pallas_kernels") / "targets" / f"{name}.txtpb").read_text()
        assert f'device_description_str: "NVIDIA {name.upper()}' in text
        assert "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }" in text
        assert text.count("{") == text.count("}")
        limits = dict(re.findall(r"(\w+): (\d+)\n", text))
        assert occupancy.WARP == int(limits["threads_per_warp"])
        assert occupancy.WARPS * occupancy.WARP == int(limits["threads_per_core_limit"])
        assert occupancy.REGISTERS == int(limits["registers_per_core_limit"])
        assert occupancy.SHARED_MEMORY == int(limits["shared_memory_per_core"])
        assert occupancy.SHARED_MEMORY - occupancy.RESERVED == int(limits["shared_memory_per_block_optin"])


def test_an_installed_package_has_its_data():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]
    assert "pallas_kernels*" in setuptools["packages"]["find"]["include"]
    files = {"pallas_kernels": ["targets/h100.txtpb", "targets/h200.txtpb"], "pallas_kernels.aot": ["record.json"]}
    for package, names in files.items():
        folder = ROOT / package.replace(".", "/")
        assert (folder / "__init__.py").is_file()  # setuptools packs no folder without it
        for name in names:
            assert (folder / name).is_file()
            assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns[package])
