"""Two processes of four devices equal one of eight; a dead one ends the job; all report mistakes; signals save."""

import re
import signal
import socket
import time

import jax
import numpy as np
import pytest

from osdn_jax.nn.split import split_model
from osdn_jax.training import build_model, load_parameters, read_metrics, train
from osdn_jax.training.distributed import start
from osdn_jax.training.profiling import parse_range
from support.forks import Forks
from support.runs import command, rows, scratch, text, tiny_config

pytestmark = pytest.mark.slow

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
# Messages of the collectives, from several threads, so that fragments may come in any order.
GLOO = re.compile(r"\[Gloo\] Rank|\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : ")
CONFIG = f"""
from support.runs import tiny_config

def get_config(arg=None):
    return tiny_config(arg or "", **{SETTINGS})
"""


@pytest.fixture(scope="module")
def both():
    """Two processes that the two processes of a job are forked from."""
    (scratch() / "mesh.py").write_text(CONFIG)
    environment = command(None)[1]["env"] | {
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COMPILATION_CACHE_DIR": str(scratch() / "programs-of-two"),
    }
    with Forks(env=environment, cwd=scratch()) as first, Forks(env=environment, cwd=scratch()) as second:
        yield first, second


def launch(both, workdir, first=(), second=()):
    """Start train.py in two processes on this machine, with different arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, _ = command(workdir, f"--coordinator=127.0.0.1:{port}", config=f"{scratch() / 'mesh.py'}:{text()}")
    for i, (process, more) in enumerate(zip(both, (first, second), strict=True)):
        said = scratch() / f"said-{i}"
        process.start([*line[1:], "--process_count=2", f"--process_id={i}", *more], out=said, err=said)


def finish(both, timeout=240):
    """Wait for both processes: [(exit status, output)]."""
    return [(process.wait(timeout), (scratch() / f"said-{i}").read_text()) for i, process in enumerate(both)]


def wait_for(both, workdir, step, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(process.running() for process in both):
        try:
            if read_metrics(workdir)[-1]["step"] >= step:
                return
        except (FileNotFoundError, IndexError):
            pass
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached: {finish(both, 0)}")


def alone(workdir):
    """The same run in this process, which has all eight devices."""
    assert train(tiny_config(text(), **SETTINGS), workdir).step == SETTINGS["steps"]


@pytest.fixture(scope="module")
def whole(both, tmp_path_factory):
    """The directory of a run in two processes."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    launch(both, workdir)
    results = finish(both)
    assert [status for status, _ in results] == [0, 0], results
    assert "8 cpu devices (2 data x 4 context)" in results[0][1]
    assert "bits per byte on the held-out text" in results[0][1]
    assert not GLOO.sub("", results[1][1]).split()  # only one of them prints
    return workdir


def losses(workdir):
    return [row["train/bits_per_byte"] for row in rows(workdir) if "train/bits_per_byte" in row]


def parameters(workdir):
    """Return the arrays of the last checkpoint, read in this process."""
    _, target = split_model(build_model(tiny_config(text(), **SETTINGS)))
    step, found = load_parameters(workdir / "checkpoints", target)
    assert step == SETTINGS["steps"]
    return found


def test_two_processes_are_one(whole, tmp_path):
    alone(tmp_path / "run")
    np.testing.assert_allclose(losses(whole), losses(tmp_path / "run"), rtol=1e-5)
    want = parameters(tmp_path / "run")
    for name, x in parameters(whole).items():
        assert np.linalg.norm(x - want[name]) <= 1e-3 * max(np.linalg.norm(want[name]), 1e-3), name


def test_one_killed_ends_the_other_and_a_restart_goes_on(both, whole, tmp_path):
    workdir = tmp_path / "run"
    launch(both, workdir)
    wait_for(both, workdir, 10)
    both[1].signal(signal.SIGKILL)
    (status, said), _ = finish(both, timeout=60)
    assert status not in (0, -signal.SIGKILL), said
    launch(both, workdir)
    results = finish(both)
    assert [status for status, _ in results] == [0, 0], results
    assert "going on from the checkpoint of step" in results[0][1]
    assert rows(workdir) == rows(whole)
    for name, x in parameters(workdir).items():
        np.testing.assert_array_equal(x, parameters(whole)[name], err_msg=name)


def test_sigterm_to_one_saves_and_ends_all_and_one_alone_goes_on(both, whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    launch(both, workdir)
    wait_for(both, workdir, 7)
    both[1].signal(signal.SIGTERM)
    results = finish(both)
    assert [status for status, _ in results] == [0, 0], results
    assert "asked to stop by SIGTERM; saved" in results[0][1]
    step = read_metrics(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert rows(workdir) == [row for row in rows(whole) if row["step"] <= step]
    alone(workdir)
    assert f"going on from the checkpoint of step {step}" in capsys.readouterr().out
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=1e-4)


def test_an_interrupt_of_one_saves_and_ends_all(both, whole, tmp_path):
    workdir = tmp_path / "run"
    launch(both, workdir)
    wait_for(both, workdir, 7)
    both[1].signal(signal.SIGINT)
    results = finish(both)
    assert [status for status, _ in results] == [0, 130], results
    assert not [said for _, said in results if "Traceback" in said]
    step = read_metrics(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(step)).is_dir()
    assert rows(workdir) == [row for row in rows(whole) if row["step"] <= step]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([], ["--config.optimizer.learning_rate=2e-3"], "optimizer.learning_rate: got 0.001 in process 0 and 0.002 in"),
        (["--config.seed=3"], [], "seed: got 3 in process 0 and 0 in process 1, expected the same in all"),
        ([], ["--config.model.width=32"], "model.width: got 16 in process 0 and 32 in process 1"),
        ([], ["--workdir=elsewhere"], "workdir: got '"),
        ([], ["--stop_at=3"], "stop_at: got None in process 0 and 3 in process 1"),
        ([], ["--config.data.path=/not/there"], "process 1 failed: no such file or folder: /not/there"),
        (["--config.model.widht=3"], [], "process 0 failed: --config.model.widht: "),
        ([], ["--profile=4:3"], "process 1 failed: profile: got '4:3', expected FIRST:LAST"),
        ([], ["--process_count=3"], "process_count: got 2 in process 0 and 3 in process 1, expected the same in all"),
        (
            ["--config.mesh.tensor=3"],
            ["--config.mesh.tensor=3"],
            "mesh: got 2 data x 1 fsdp x 3 tensor x 4 context, 24",
        ),
    ],
)
def test_a_mistake_is_told_by_every_process_before_anything_is_written(both, tmp_path, first, second, words):
    launch(both, tmp_path / "run", first, second)
    for status, said in finish(both, timeout=60):
        lines = [line for line in GLOO.sub("", said).splitlines() if line.strip()]
        assert (status, len(lines)) == (2, 1), said
        assert f"train.py: error: {words}" in said
    assert not (tmp_path / "run").exists()
    assert not (scratch() / "elsewhere").exists()


def test_a_directory_of_another_run_is_refused_by_every_process(both, whole, capsys):
    files = sorted(whole.rglob("*"))
    launch(both, whole, *[["--config.seed=5"]] * 2)
    for status, said in finish(both, timeout=60):
        assert status == 2
        assert "process 0 failed: " in said
        assert "seed: 0 there, 5 now" in said
    assert sorted(whole.rglob("*")) == files


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"coordinator": "a:1"}, "--coordinator: expected --process_id and --process_count beside it"),
        ({"process_id": 1, "process_count": 2}, "--process_id, --process_count: expected --coordinator beside it"),
        ({"coordinator": "a:1", "process_id": 2, "process_count": 2}, "process_id: got 2, expected from 0 to below"),
        ({"coordinator": "a:1", "process_id": -1, "process_count": 2}, "process_id: got -1, expected from 0 to below"),
        ({"coordinator": "a:1", "process_id": 0, "process_count": 0}, "process_count: got 0, expected at least 1"),
        ({"coordinator": "a:b", "process_id": 0, "process_count": 1}, "coordinator: got 'a:b', expected HOST:PORT"),
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
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID: got 2, expected from 0 to below JAX_NUM_PROCESSES = 2"):
        start()
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS: got 'a', expected HOST:PORT"):
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
