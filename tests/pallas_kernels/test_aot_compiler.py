"""The processes of `pallas_kernels.aot` around the compiler, which is replaced: capture, errors, environment."""

import dataclasses
import fnmatch
import os
import re
import tomllib
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from pallas_kernels.aot import compiler, occupancy, workers
from pallas_kernels.aot.assembler import parse
from pallas_kernels.aot.cases import Case
from pallas_kernels.aot.compiler import Outcome, compile_case
from support.aot import NAME, NVJITLINK, kernel_call

ROOT = Path(__file__).parent.parent.parent
CASE = Case("delta_rule", True, 128, 128, "scalar")


def _prints(text, error=None):
    def compile_(case, gpu):
        os.write(1, text.encode())
        os.write(2, b"a note\n")
        if error is not None:
            raise error
        return kernel_call("a", "hash")

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
    """A pool of one process, which dies at a K of 256."""

    made = 0

    def __init__(self, workers, mp_context, initializer, initargs):
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
        text = compiler.description(name)
        assert f'device_description_str: "NVIDIA {name.upper()}' in text
        assert "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }" in text
        assert text.count("{") == text.count("}")
        limits = dict(re.findall(r"(\w+): (\d+)\n", text))
        assert occupancy.WARP == int(limits["threads_per_warp"])
        assert occupancy.HOPPER.warps * occupancy.WARP == int(limits["threads_per_core_limit"])
        assert occupancy.REGISTERS == int(limits["registers_per_core_limit"])
        assert occupancy.HOPPER.shared_memory == int(limits["shared_memory_per_core"])
        assert occupancy.HOPPER.shared_memory - occupancy.RESERVED == int(limits["shared_memory_per_block_optin"])


def test_an_installed_package_has_its_data():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]
    assert "pallas_kernels*" in setuptools["packages"]["find"]["include"]
    described = [f"targets/{name}.txtpb" for name in ("h100", "h200", "a100", "rtx4090")]
    files = {"pallas_kernels": described, "pallas_kernels.aot": ["record.json"]}
    for package, names in files.items():
        folder = ROOT / package.replace(".", "/")
        assert (folder / "__init__.py").is_file()  # setuptools skips a folder without it
        for name in names:
            assert (folder / name).is_file()
            assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns[package])
