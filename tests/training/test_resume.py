"""A run that was interrupted, killed or damaged comes to the same end, bit for bit, as one that was not."""

import gc
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from osdn_jax.training import read_metrics, train
from support.runs import (
    arrays,
    assert_same_run,
    command,
    finished,
    position,
    rows,
    run,
    text,
    tiny_config,
)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The directory of a run that was stopped after 20 of its 40 steps, in this process. Leave it as it is."""
    workdir = tmp_path_factory.mktemp("half") / "run"
    assert train(tiny_config(text()), workdir, stop_at=20).step == 20
    return workdir


@pytest.fixture
def interrupted(half, tmp_path):
    return shutil.copytree(half, tmp_path / "run")


def steps_kept(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


def test_stopping_says_so_and_keeps_all(half):
    assert steps_kept(half) == [10, 20]
    assert [row["step"] for row in rows(half) if "train/bits_per_byte" in row] == list(range(1, 21))
    assert rows(half) == rows(finished()[0])[: len(rows(half))]


def test_a_new_process_goes_on_as_if_nothing_had_been(interrupted):
    # The other process compiles its own programs and has one device where this one has eight.
    done = run(interrupted, cached=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "going on from the checkpoint of step 20 of 40" in done.stdout
    assert "bits per byte on the held-out text; see" in done.stdout
    assert_same_run(interrupted, finished()[0])
    assert position(interrupted, 30) != position(interrupted, 40)  # which is what a lost position would show in


def test_going_on_in_steps_of_one(interrupted):
    for stop in (21, 22, 25):
        assert train(tiny_config(text()), interrupted, stop_at=stop).step == stop
    assert steps_kept(interrupted) == [22, 25]
    wanted = [row for row in rows(finished()[0]) if row["step"] <= 25]
    assert rows(interrupted) == wanted


def test_a_finished_run_stays_as_it_is(tmp_path):
    workdir = shutil.copytree(finished()[0], tmp_path / "run")
    before = arrays(workdir)
    result = train(tiny_config(text()), workdir)
    assert result._replace(tokens_per_second=None) == finished()[1]._replace(tokens_per_second=None)
    assert result.tokens_per_second is None  # nothing was trained
    assert arrays(workdir) == before
    assert rows(workdir) == rows(finished()[0])
    assert train(tiny_config(text()), workdir, stop_at=5).step == 40  # in the past: nothing to do


def cut(folder):
    """Truncates the file that holds most of a checkpoint's arrays."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Orbax leaves its other reads unawaited when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_truncated_checkpoint_is_said_and_passed_over(interrupted, capsys):
    cut(interrupted / "checkpoints" / "20")
    train(tiny_config(text()), interrupted)
    said = capsys.readouterr().out
    (warning,) = (line for line in said.splitlines() if line.startswith("warning: "))
    for words in ("checkpoint 20 cannot be read", "now 20.corrupt", "using step 10"):
        assert words in warning
    assert "going on from the checkpoint of step 10 of 40" in said
    assert_same_run(interrupted, finished()[0])
    gc.collect()


def test_where_nothing_more_can_be_written_the_last_checkpoint_stays(interrupted):
    """A limit on the size of files in place of a full disk: what writes a checkpoint's arrays fails likewise."""
    line, keywords = command(interrupted, cached=False)
    limited = ["bash", "-c", 'ulimit -f 20 && exec "$@"', "limited", *line]  # kilobytes
    done = subprocess.run(limited, capture_output=True, timeout=120, check=False, **keywords)
    assert done.returncode == 2
    (error,) = (words for words in done.stderr.splitlines() if words.startswith("train.py: error: "))
    assert "saving checkpoint 30 in" in error
    assert "the newest complete checkpoint is step 20" in error
    assert steps_kept(interrupted) == [10, 20]
    train(tiny_config(text()), interrupted)
    assert_same_run(interrupted, finished()[0])


# Killed

EVERY_STEP = "--config.checkpoint.every=1"


def saving(workdir):
    """Whether a checkpoint is being written, as one sees it from outside."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def last_step(workdir):
    """The step of the last row; 0 before there is one. Quick, because it is asked again and again."""
    try:
        complete = (workdir / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    return json.loads(complete.rpartition(b"\n")[2])["step"] if complete else 0


def kill(forks, workdir, moment, *arguments):
    """Starts train.py and ends it by SIGKILL at a moment; returns the steps of checkpoints complete by then."""
    forks.start(command(workdir, EVERY_STEP, *arguments)[0][1:])
    end = time.monotonic() + 90
    while time.monotonic() < end and forks.running() and not moment(workdir):
        time.sleep(0.002)
    assert forks.running(), "the run was over before it was killed"
    forks.signal(signal.SIGKILL)
    assert forks.wait() == -signal.SIGKILL
    return steps_kept(workdir)


def test_killed_at_any_moment_a_run_loses_no_more_than_the_step_under_way(forks, tmp_path, capsys):
    workdir = tmp_path / "run"
    finished()  # its programs are compiled by now
    for moment in (
        lambda folder: saving(folder) and steps_kept(folder),  # while a checkpoint is written
        lambda folder: last_step(folder) >= 14,  # between two of them, or wherever it was
    ):
        before = kill(forks, workdir, moment)
        seen = rows(workdir)[-1]["step"]
        assert before[-1] < 40
        assert before[-1] >= seen - 2  # the save of the step before the last row may still have been under way
    train(tiny_config(text(), checkpoint__every=1), workdir)
    said = capsys.readouterr().out
    assert f"going on from the checkpoint of step {before[-1]} of 40" in said
    assert "warning" not in said
    assert_same_run(workdir, finished()[0])
    steps = [row["step"] for row in rows(workdir) if "train/bits_per_byte" in row]
    assert steps == list(range(1, 41))
    assert steps_kept(workdir) == [39, 40]
    assert not saving(workdir)  # what the dead left is cleared away


def test_killed_twenty_times_at_random(forks, tmp_path, capsys):
    """Whatever the moment, the next start goes on from a complete checkpoint, no older than the last one saved."""
    workdir, draw = tmp_path / "run", np.random.default_rng(0)
    newest = 0
    for _ in range(20):
        wait = float(draw.uniform(0.0, 0.15))

        def moment(folder, newest=newest, wait=wait):
            if last_step(folder) < newest + 3:
                return False
            time.sleep(wait)
            return True

        kept = kill(forks, workdir, moment, "--config.steps=2000", "--config.model.rule=linear_attention")
        seen = read_metrics(workdir)[-1]["step"]
        assert kept[-1] >= max(newest, seen - 2)
        newest = kept[-1]
    config = tiny_config(text(), checkpoint__every=1, steps=2000, model__rule="linear_attention")
    train(config, workdir, stop_at=newest + 1)
    said = capsys.readouterr().out
    assert f"going on from the checkpoint of step {newest:,} of 2,000" in said
    assert "warning" not in said
    assert [row["step"] for row in rows(workdir) if "train/bits_per_byte" in row] == list(range(1, newest + 2))
