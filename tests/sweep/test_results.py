"""The results file and the claims: several processes, torn lines, full disks."""

import json
import os
import subprocess
import sys

import pytest

from osdn_jax.sweep import append_result, read_results
from osdn_jax.sweep.claims import Claims
from support.runs import ROOT

# The file alone: importing the package takes seconds in every process.
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("alone", f"osdn_jax/sweep/{sys.argv[1]}.py")
alone = importlib.util.module_from_spec(spec)
spec.loader.exec_module(alone)
"""


def start(module, script, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", LOAD + script, module, *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    script = """
input()
for i in range(40):
    alone.append_result(sys.argv[2], {"key": f"{sys.argv[3]}-{i}", "curve": [i] * 3000})
"""
    file = tmp_path / "results.jsonl"
    processes = [start("results", script, file, name) for name in "abc"]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    results = read_results(file)
    assert results.damaged == []
    assert sorted(r["key"] for r in results.records) == sorted(f"{name}-{i}" for name in "abc" for i in range(40))
    assert all(r["curve"] == [int(r["key"][2:])] * 3000 for r in results.records)


def test_a_torn_line_is_left_out_and_named(tmp_path):
    file = tmp_path / "results.jsonl"
    append_result(file, {"key": "a"})
    with file.open("a") as torn:
        torn.write('{"key": "b", "accu')
    results = read_results(tmp_path)
    assert [r["key"] for r in results.records] == ["a"]
    assert results.damaged == [f"{file}, line 2 is not the record of a run, and is left out"]
    append_result(file, {"key": "c"})
    results = read_results(file)
    assert [r["key"] for r in results.records] == ["a", "c"]
    assert len(results.damaged) == 1


@pytest.mark.parametrize("line", ["[]", "3", '{"seed": 0}', '{"key": 1}', "\x00\x00", "[" * 100_000])
def test_other_lines_are_left_out(tmp_path, line):
    file = tmp_path / "results.jsonl"
    file.write_text(line + "\n" + json.dumps({"key": "a"}) + "\n")
    results = read_results(file)
    assert [r["key"] for r in results.records] == ["a"]
    assert len(results.damaged) == 1


def test_no_file_has_no_results(tmp_path):
    assert read_results(tmp_path) == ([], [])


def test_a_full_disk_is_named_and_leaves_no_part():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="/dev/full"):
        append_result("/dev/full", {"key": "a"})


def test_a_claim_ends_with_its_process(tmp_path):
    script = """
claims = alone.Claims(sys.argv[2])
print(claims.take("00ff"), claims.take("00fe"), flush=True)
input()
"""
    with Claims(tmp_path) as claims:
        assert claims.take("00fe")
        process = start("claims", script, tmp_path)
        assert process.stdout.readline() == "True False\n"
        assert not claims.take("00ff")
        process.kill()
        process.communicate()
        assert claims.take("00ff")
        assert claims.take("00ff")
        claims.release("00ff")
        claims.release("00ff")
