"""Two processes of four devices are one of eight; a dead or hung one ends the job; SIGTERM saves."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from osdn_jax.nn.functional import functional
from osdn_jax.training import build_model, load_parameters, read_metrics
from osdn_jax.training.distributed import start
from osdn_jax.training.profiling import parse_range
from support.runs import ROOT, rows, scratch, text, tiny_config

SETTINGS = {
    "steps": 24,
    "batch_size": 8,
    "sequence_length": 32,
    "validation__batch_size": 8,
    "validation__every": 24,
    "model__heads": 4,
    "model__mlp_dim": 32,
    "optimizer__learning_rate": 1e-3,
    "checkpoint__every": 4,
    "mesh__data": 2,
    "mesh__context": 4,
}
CONFIG = f"""
from support.runs import tiny_config

def get_config(arg=None):
    return tiny_config(arg or "", **{SETTINGS})
"""


def launch(workdir, *arguments, processes=2, devices=4):
    """train.py in several processes on this machine."""
    (scratch() / "mesh.py").write_text(CONFIG)
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(scratch() / f"programs-{processes}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, str(ROOT / "train.py"), f"--config={scratch() / 'mesh.py'}:{text()}"]
    line += [f"--workdir={workdir}", *arguments]
    several = [f"--coordinator=127.0.0.1:{port}", f"--process_count={processes}"]
    return [
        subprocess.Popen(
            [*line, *(several + [f"--process_id={i}"] if processes > 1 else [])],
            env=environment,
            cwd=scratch(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]


def finish(processes, timeout=240):
    """[(exit status, output)], all of them ended."""
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode)[::-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for(workdir, step, processes, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        try:
            if read_metrics(workdir)[-1]["step"] >= step:
                return
        except (FileNotFoundError, IndexError):
            pass
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached: {[p.communicate()[0] for p in processes if p.poll() is not None]}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The directory of a run in two processes."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    results = finish(launch(workdir))
    assert [status for status, _ in results] == [0, 0], results
    assert "8 cpu devices (2 data x 4 context)" in results[0][1]
    assert "bits per byte on the held-out text" in results[0][1]
    assert not [line for line in results[1][1].splitlines() if not line.startswith("[Gloo]")]  # it leaves that to one
    return workdir


def losses(workdir):
    return [row["train/bits_per_byte"] for row in rows(workdir) if "train/bits_per_byte" in row]


def parameters(workdir):
    """Of the last checkpoint, read in this process."""
    _, target = functional(build_model(tiny_config(text(), **SETTINGS)))
    step, found = load_parameters(workdir / "checkpoints", target)
    assert step == SETTINGS["steps"]
    return found


def test_two_processes_are_one(whole, tmp_path):
    (result,) = finish(launch(tmp_path / "run", processes=1, devices=8))
    assert result[0] == 0, result[1]
    np.testing.assert_allclose(losses(whole), losses(tmp_path / "run"), rtol=1e-5)
    want = parameters(tmp_path / "run")
    for name, x in parameters(whole).items():
        assert np.linalg.norm(x - want[name]) <= 1e-3 * max(np.linalg.norm(want[name]), 1e-3), name


def test_one_killed_ends_the_other_and_a_restart_goes_on(whole, tmp_path):
    workdir = tmp_path / "run"
    processes = launch(workdir)
    wait_for(workdir, 10, processes)
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    (status, said), _ = finish(processes, timeout=60)
    assert time.monotonic() - began < 60
    assert status not in (0, -signal.SIGKILL), said
    results = finish(launch(workdir))
    assert [status for status, _ in results] == [0, 0], results
    assert "going on from the checkpoint of step" in results[0][1]
    assert rows(workdir) == rows(whole)
    for name, x in parameters(workdir).items():
        np.testing.assert_array_equal(x, parameters(whole)[name], err_msg=name)


def test_sigterm_to_one_saves_and_ends_all_and_one_alone_goes_on(whole, tmp_path):
    workdir = tmp_path / "run"
    processes = launch(workdir)
    wait_for(workdir, 7, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [status for status, _ in results] == [0, 0], results
    assert "asked to stop by SIGTERM; saved" in results[0][1]
    step = read_metrics(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert rows(workdir) == [row for row in rows(whole) if row["step"] <= step]
    (result,) = finish(launch(workdir, processes=1, devices=8))
    assert result[0] == 0, result[1]
    assert f"going on from the checkpoint of step {step}" in result[1]
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "a:1"}, "--coordinator: expected --process_id and --process_count beside it"),
        ({"process_id": 1, "process_count": 2}, "--process_id, --process_count: expected --coordinator beside it"),
        ({"coordinator": "a:1", "process_id": 2, "process_count": 2}, "process_id: got 2, expected from 0 to below"),
    ],
)
def test_wrong_arguments(given, words):
    with pytest.raises(ValueError, match=words):
        start(**given)


def test_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID: got 'two', expected a number"):
        start()


@pytest.mark.parametrize(
    ("environment", "together"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, True),
    ],
)
def test_who_is_alone(environment, together, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: joined.append(options))
    start()
    assert bool(joined) == together


@pytest.mark.parametrize("wrong", ["5", "5:4", "0:3", "a:b", "1:2:3", ""])
def test_steps_of_a_trace(wrong):
    assert parse_range("20:25") == (20, 25)
    with pytest.raises(ValueError, match="expected FIRST:LAST"):
        parse_range(wrong)
