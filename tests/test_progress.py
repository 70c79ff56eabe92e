"""Progress bars and the stopwatch."""

import errno
import io
import os
import re

import pytest
from rich.console import Console

from osdn_jax import progress
from osdn_jax.data.shards.manifest import Shard
from osdn_jax.progress import PrepareBar, ProgressBar, Stopwatch


def test_progress_is_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with ProgressBar(1000, every=3600, console=Console(file=out, width=20)) as bar:
        for step in range(1, 1001):
            bar.update(step, tokens=1000, bits_per_byte=2.5)
        bar.print("saved [bold]")
    lines = out.getvalue().splitlines()
    assert len(lines) == 3  # the first, the last, and the printed one
    assert lines[0] == "step 1 of 1,000  2.500 bits per byte  the first step took 0 s"
    assert re.fullmatch(r"step 1,000 of 1,000  2\.500 bits per byte  [\d.e+]+ [kMG] tokens/s  0 s left", lines[1])
    assert lines[2] == "saved [bold]"
    assert "\x1b" not in out.getvalue()


def test_progress_speaks_every_so_many_seconds_and_knows_the_speed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    bar = ProgressBar(5000, start_step=100, every=30, console=Console(file=out))
    for step in range(101, 221):
        clock[0] += 1.0
        bar.update(step, tokens=2000)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"step {s} of 5,000" for s in (101, 131, 161, 191)]
    assert lines[1].split("  ")[1:] == ["2 k tokens/s", "1 h 21 min left"]


def test_progress_that_cannot_be_shown_is_one_warning(caplog):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with ProgressBar(3, every=0, console=Console(file=Full())) as bar:
        for step in range(1, 4):
            bar.update(step, tokens=1)
    (record,) = caplog.records
    assert record.getMessage().endswith("standard output: [Errno 28] No space left on device")


@pytest.mark.parametrize("terminal", [True, False])
def test_an_exception_passes_and_the_terminal_is_left_in_order(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal)
    with pytest.raises(KeyError, match="mine"), ProgressBar(10, console=console) as bar:
        bar.update(3, tokens=1, bits_per_byte=1.0)
        raise KeyError("mine")
    text = out.getvalue()
    assert ("\x1b" in text) == terminal
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is shown again as often as hidden
    assert text.removesuffix("\x1b[?25h").endswith("\n")
    assert "1.000 bits per byte" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(7.4, "7 s"), (66, "1 min 06 s"), (3 * 3600 + 300, "3 h 05 min"), (26 * 3600, "1 d 2 h"), (-1, "0 s")],
)
def test_durations(seconds, words):
    assert progress._duration(seconds) == words


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with PrepareBar(1000, console=console) as bar:
        bar.skipped(Shard(documents=3, tokens=40, text_bytes=400, file_bytes=1, end={}))
        bar.advance(tokens=20, text_bytes=100)
        bar.finished(1)
    shown = console.file.getvalue()
    assert "4 documents  60 tokens" in shown
    assert "\u2501" * 20 in shown
    assert "is complete" not in shown


def test_the_stopwatch_leaves_out_what_it_should(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("osdn_jax.progress.time.perf_counter", lambda: now[0])
    clock = Stopwatch()
    now[0] += 5
    assert clock.rate(10) is None
    clock.start()
    assert clock.rate(10) is None
    now[0] += 2
    with clock.paused():
        now[0] += 50
        assert clock.seconds == 2
    now[0] += 3
    assert clock.seconds == 5
    assert clock.rate(10) == 2.0
    assert clock.rate(0) is None
    with pytest.raises(KeyError), clock.paused():
        raise KeyError
    now[0] += 5
    assert clock.rate(10) == 1.0  # it runs again, whatever happened inside
