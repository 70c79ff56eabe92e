"""Signals that stop a run, and the watchdog."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from osdn_jax.training import Interrupted, loop, read_metrics, train
from osdn_jax.training.interruption import Stop, Watchdog
from support.runs import CONFIG_FILE, ROOT, assert_same_run, command, finished, text, tiny_config

pytestmark = pytest.mark.slow

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


@pytest.fixture
def interruptible():
    """Handle Ctrl-C as Python does, even if the tests ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_interrupt_asks_to_stop_and_the_second_interrupts(interruptible):
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.reached(1)
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a background process
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.reached(1)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_train_saves_before_it_raises_the_interrupt(interruptible, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Stopwatch, "start", lambda self: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted) as interrupted:
        train(tiny_config(text()), tmp_path / "run")
    assert isinstance(interrupted.value, KeyboardInterrupt)
    assert (interrupted.value.result.step, interrupted.value.result.bits_per_byte) == (1, None)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


TWICE = """
import hashlib
from osdn_jax.training.interruption import Stop, end_at_second_interrupt

end_at_second_interrupt()
with Stop():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # takes minutes, in which Python calls no signal handler
"""


def test_a_second_interrupt_ends_the_process_whatever_it_is_doing(forks, tmp_path):
    (tmp_path / "twice.py").write_text(TWICE)
    forks.start([str(tmp_path / "twice.py")], out=tmp_path / "out", err=tmp_path / "err")
    end = time.monotonic() + 60
    while time.monotonic() < end and not ((tmp_path / "out").exists() and "ready" in (tmp_path / "out").read_text()):
        time.sleep(0.01)
    forks.signal(signal.SIGINT)
    assert forks.running(0.3)
    while time.monotonic() < end and forks.running(0.3):  # signals before the first is handled count as one
        with contextlib.suppress(ProcessLookupError):  # it may end between the check and the signal
            forks.signal(signal.SIGINT)
    assert (forks.wait(60), (tmp_path / "err").read_text()) == (130, "")


def test_an_interrupt_before_training_is_one_line(forks, tmp_path):
    interrupts = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "interrupts.py").write_text(interrupts + CONFIG_FILE)
    line = command(tmp_path / "run", config=f"{tmp_path / 'interrupts.py'}:{text()}")[0][1:]
    forks.start(line, out=tmp_path / "out", err=tmp_path / "err")
    assert forks.wait(60) == 130
    assert ((tmp_path / "out").read_text(), (tmp_path / "err").read_text()) == ("", "train.py: interrupted\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "name", "status"), [(signal.SIGTERM, "SIGTERM", 0), (signal.SIGINT, "Ctrl-C", 130)])
def test_a_signal_saves_and_the_same_command_goes_on(forks, tmp_path, number, name, status):
    finished()
    line = command(tmp_path / "run")[0][1:]
    out, err = tmp_path / "out", tmp_path / "err"
    forks.start(line, out=out, err=err)
    end = time.monotonic() + 90
    while time.monotonic() < end and forks.running() and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    forks.signal(number)
    assert (forks.wait(60), err.read_text()) == (status, "")
    said = out.read_text()
    step = read_metrics(tmp_path / "run")[-1]["step"]
    assert 0 < step < 40
    assert f"step {step}: asked to stop by {name}; saved" in said
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
