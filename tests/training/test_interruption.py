"""A signal to stop, and the watch over what hangs."""

import os
import signal
import subprocess
import sys
import time

from osdn_jax.training import read_metrics
from osdn_jax.training.interruption import Stop, Watchdog
from support.runs import ROOT, assert_same_run, command, finished

HANGS = """
import time
from osdn_jax.training.interruption import Watchdog
with Watchdog(1.0) as watchdog:
    for _ in range(4):
        time.sleep(0.5)
        watchdog.beat()
    print("moved", flush=True)
    time.sleep(60)
"""


def test_what_hangs_is_ended_with_a_traceback():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", HANGS]
    done = subprocess.run(line, capture_output=True, text=True, timeout=50, check=False, env=environment)
    assert done.returncode == 1
    assert done.stdout == "moved\n"
    assert "Timeout" in done.stderr
    assert 'File "<string>", line' in done.stderr


def test_a_watch_that_is_over_ends_nothing():
    with Watchdog(0.2):
        pass
    with Watchdog(0.0) as none:
        none.beat()
    time.sleep(0.4)


def test_stop_listens_and_puts_back_what_was():
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reached(2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_saves_and_the_same_command_goes_on(forks, tmp_path):
    finished()
    line = command(tmp_path / "run")[0][1:]
    out, err = tmp_path / "out", tmp_path / "err"
    forks.start(line, out=out, err=err)
    end = time.monotonic() + 90
    while time.monotonic() < end and forks.running() and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    forks.signal(signal.SIGTERM)
    assert (forks.wait(60), err.read_text()) == (0, "")
    said = out.read_text()
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert 0 < step < 40
    assert f"step {step}: asked to stop by SIGTERM; saved" in said
    assert f"stopped after step {step}; the same command goes on from there" in said
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    forks.start(line)
    assert forks.wait() == 0
    assert_same_run(tmp_path / "run", finished()[0])


def test_a_trace_of_some_steps(forks, tmp_path):
    line = command(tmp_path / "run", "--profile=3:4", "--stop_at=6")[0][1:]
    forks.start(line, err=tmp_path / "err")
    assert (forks.wait(), (tmp_path / "err").read_text()) == (0, "")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
