"""The lock of a run's directory."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import time

import pytest

from osdn_jax.generate import generate
from osdn_jax.training import ConfigError, WorkdirInUseError, read_metrics, train
from osdn_jax.training.lock import LOCK_FILE, WorkdirLock
from support.runs import command, text, tiny_config

pytestmark = pytest.mark.slow


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_second_lock_is_refused_and_names_the_first(tmp_path):
    workdir = tmp_path / "new" / "run"
    with WorkdirLock(workdir):
        before = listing(workdir)
        who = f"process {os.getpid()} on {re.escape(socket.gethostname())} since 20.*; wait"
        with pytest.raises(WorkdirInUseError, match=f"run is in use by {who}") as error, WorkdirLock(workdir):
            pass
        assert isinstance(error.value, ConfigError)
        assert "\n" not in str(error.value)
        assert listing(workdir) == before
    assert list(workdir.iterdir()) == []
    with WorkdirLock(workdir), WorkdirLock(tmp_path / "other"):
        pass


def test_a_file_that_a_dead_process_left_holds_nothing(tmp_path):
    (tmp_path / LOCK_FILE).write_text("process 1 on this machine since yesterday\n")
    with WorkdirLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_is_removed_at_that_moment_is_taken_again(tmp_path, monkeypatch):
    real, taken = fcntl.flock, []

    def flock(file, how):
        real(file, how)
        if not taken:  # as if its holder had ended between open and lock
            (tmp_path / LOCK_FILE).unlink()
        taken.append(file)

    monkeypatch.setattr(fcntl, "flock", flock)
    with WorkdirLock(tmp_path):
        assert len(taken) == 2
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(WorkdirInUseError), WorkdirLock(tmp_path):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with WorkdirLock(tmp_path), WorkdirLock(tmp_path):
        pass
    assert "cannot be locked (No locks available)" in caplog.text


def test_a_run_is_refused_a_directory_in_use_with_status_2_and_touches_nothing(forks, tmp_path):
    workdir = tmp_path / "run"
    with WorkdirLock(workdir):
        (workdir / "mine.txt").write_text("mine")
        before = listing(workdir)
        forks.start(command(workdir)[0][1:], out=tmp_path / "out", err=tmp_path / "err")
        assert (forks.wait(), (tmp_path / "out").read_text()) == (2, "")
        said = (tmp_path / "err").read_text()
        assert said.startswith(f"train.py: error: {workdir} is in use by process {os.getpid()} on ")
        assert said.count("\n") == 1
        assert listing(workdir) == before


def test_a_run_holds_its_directory_until_it_is_killed(forks, tmp_path):
    """A refused start changes nothing; readers need no lock."""
    workdir, steps = tmp_path / "run", "--config.steps=100000"
    forks.start(command(workdir, steps)[0][1:])
    end = time.monotonic() + 90
    while time.monotonic() < end and forks.running() and not (workdir / "checkpoints" / "20").is_dir():
        time.sleep(0.01)
    config = tiny_config(text(), steps=100_000)
    with pytest.raises(WorkdirInUseError, match="in use by process"):
        train(config, workdir)
    with pytest.raises(WorkdirInUseError, match="in use by process"):  # before the configurations are compared
        train(tiny_config(text(), seed=1), workdir)
    assert len("".join(generate(workdir, tokens=3))) <= 3
    assert forks.running()
    forks.signal(signal.SIGKILL)
    assert forks.wait() == -signal.SIGKILL
    assert (workdir / LOCK_FILE).exists()
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "train/bits_per_byte" in row] == list(range(1, rows[-1]["step"] + 1))
    kept = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    assert train(config, workdir, stop_at=kept + 1).step == kept + 1
    assert not (workdir / LOCK_FILE).exists()
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0
