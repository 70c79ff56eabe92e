"""A run that was interrupted, killed or damaged comes to the same end, bit for bit, as one that was not."""

import gc
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from osdn_jax.data import PreparedTokens
from osdn_jax.data.prepare import prepare
from osdn_jax.generate import generate
from osdn_jax.training import CheckpointError, CheckpointMismatchError, fingerprints, read_metrics, train
from support.corpora import write_jsonl, write_parquet, write_tokenizer
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
    write_text,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Return the directory of a run that was stopped after 20 of its 40 steps, in this process. Do not change it."""
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
    assert position(interrupted, 30) != position(interrupted, 40)  # so a lost position would be noticed


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
    """Truncate the file that holds most of a checkpoint's arrays."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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
    """A limit on the size of files instead of a full disk: writing a checkpoint's arrays fails in the same way."""
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


# Another text, another tokenizer


def replaced(path, old, new):
    """The content of a file, in which some bytes are replaced by as many others."""
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    return content


def assert_refused(config, workdir, what):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointMismatchError, match=f"was trained with another {what} ") as error:
        train(config, workdir)
    assert "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["txt", "tokens", "prepared", "hub", "mixture"])
def test_another_text_of_the_same_size_is_refused_by_name(tmp_path, kind):
    """The run resumes once the text is back. The held-out text has its own fingerprint."""
    lines = write_text(tmp_path / "lines.txt", words=720).read_text().splitlines()
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    changes = {"steps": 2, "optimizer__warmup_steps": 1, "validation__every": 2, "model__rule": "linear_attention"}
    if kind != "txt":
        changes["data__tokenizer"] = str(write_tokenizer(tmp_path / "tokenizer.json"))
    data = {"txt": tmp_path / "lines.txt", "tokens": source, "prepared": tmp_path / "prepared"}.get(kind, "")

    def write():
        if kind == "prepared":
            shutil.rmtree(data, ignore_errors=True)
            prepare(source, data, tokenizer=tmp_path / "tokenizer.json", shard_bytes=1500)
        elif kind == "hub":
            (tmp_path / "set").mkdir(exist_ok=True)
            write_parquet(
                tmp_path / "set" / "train.parquet", [json.loads(row)["text"] for row in source.read_text().splitlines()]
            )

    write()
    if kind == "hub":
        data = f"hf:{tmp_path / 'set'}"
        changes |= {"data__validation_documents": 6, "data__shuffle_windows": 4}
    if kind == "mixture":
        changes["data__mixture"] = f"{source}:1,{tmp_path / 'lines.txt'}:2"
    config = tiny_config(data, **changes)
    train(config, tmp_path / "run", stop_at=1)
    file = tmp_path / "lines.txt" if kind == "txt" else source
    old, new = (lines[i].split()[0].encode() for i in (3, 4))
    new = new[: len(old)].ljust(len(old), b"e")
    before = replaced(file, old, new if new != old else old[::-1])
    write()
    what = "(text|held-out text)"
    assert_refused(config, tmp_path / "run", what)
    file.write_bytes(before)
    write()
    assert train(config, tmp_path / "run").step == 2
    if kind == "txt":
        last = lines[-1].encode()
        replaced(file, last, last[::-1])
        assert_refused(config, tmp_path / "run", "held-out text")


def test_another_tokenizer_of_the_same_size_is_refused_by_name(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    lines = write_text(tmp_path / "lines.txt", words=300)
    changes = {"steps": 2, "optimizer__warmup_steps": 1, "model__rule": "linear_attention"}
    config = tiny_config(lines, data__tokenizer=str(tokenizer), **changes)
    train(config, tmp_path / "run", stop_at=1)
    text = "".join(generate(tmp_path / "run", "the", tokens=3))
    values = json.loads(tokenizer.read_text())
    before, vocabulary = tokenizer.read_bytes(), values["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    tokenizer.write_text(json.dumps(values))
    assert_refused(config, tmp_path / "run", "tokenizer")
    with pytest.raises(CheckpointMismatchError, match="was trained with another tokenizer "):
        generate(tmp_path / "run", "the", tokens=3)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "!"}')  # the same file with another start token
    tokenizer.write_bytes(before)
    assert_refused(config, tmp_path / "run", "tokenizer")
    (tmp_path / "tokenizer_config.json").unlink()
    assert "".join(generate(tmp_path / "run", "the", tokens=3)) == text
    assert train(config, tmp_path / "run").step == 2


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(interrupted, capsys):
    for step in ("10", "20"):
        file = interrupted / "checkpoints" / step / "metadata" / "metadata"
        record = json.loads(file.read_text())
        assert sorted(record) == ["checksums", "fingerprints", "metadata", "step"]
        file.write_text(json.dumps({name: record[name] for name in ("checksums", "metadata")}))
    assert "".join(generate(interrupted, tokens=3))
    train(tiny_config(text()), interrupted)
    said = capsys.readouterr().out
    (warning,) = (line for line in said.splitlines() if line.startswith("warning: "))
    assert "checkpoint 20 has no fingerprint of its text and held-out text and tokenizer" in warning
    assert_same_run(interrupted, finished()[0])


def test_a_renamed_checkpoint_of_an_earlier_version_is_named(interrupted):
    file = interrupted / "checkpoints" / "20" / "metadata" / "metadata"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({name: record[name] for name in ("checksums", "metadata")}))
    (interrupted / "checkpoints" / "20").rename(interrupted / "checkpoints" / "35")
    with pytest.raises(CheckpointError, match="checkpoints/35 is a checkpoint of step 20 under another name"):
        train(tiny_config(text()), interrupted)
    assert rows(interrupted)[-1]["step"] == 20


def test_large_prepared_data_is_known_by_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "_ALL", 200)
    monkeypatch.setattr(fingerprints, "_PIECES", 5)
    monkeypatch.setattr(fingerprints, "_PIECE", 7)
    lines = write_text(tmp_path / "lines.txt").read_text().splitlines()

    def of(lines, **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        prepare(write_jsonl(tmp_path / "rows.jsonl", lines), folder, tokenizer="bytes", **changes)
        return fingerprints.of_prepared(PreparedTokens(folder))

    one = of(lines)
    assert of(lines, shard_bytes=1000) == one  # for any shard size
    assert of(lines[::-1]) != one
    assert of([lines[0], lines[1] + "s", *lines[2:]]) != one
    assert of(["X" + lines[0][1:], *lines[1:]]) != one
    assert of([*lines[:-1], lines[-1][:-1] + "X"]) != one


# Killed

EVERY_STEP = "--config.checkpoint.every=1"


def saving(workdir):
    """Return True if a checkpoint is being written."""
    return any((workdir / "checkpoints").glob("*tmp*"))


def last_step(workdir):
    """Return the step of the last row; 0 if there is none. Fast, because it is polled."""
    try:
        complete = (workdir / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    return json.loads(complete.rpartition(b"\n")[2])["step"] if complete else 0


def kill(forks, workdir, moment, *arguments):
    """Start train.py and kill it at a given moment; return the steps of the checkpoints complete by then."""
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
    finished()  # so that its programs are compiled
    for moment in (
        lambda folder: saving(folder) and steps_kept(folder),  # while a checkpoint is being written
        lambda folder: last_step(folder) >= 14,  # between two of them, or anywhere
    ):
        before = kill(forks, workdir, moment)
        seen = rows(workdir)[-1]["step"]
        assert before[-1] < 40
        assert before[-1] >= seen - 2  # the save of the step before the last row may still have been running
    train(tiny_config(text(), checkpoint__every=1), workdir)
    said = capsys.readouterr().out
    assert f"going on from the checkpoint of step {before[-1]} of 40" in said
    assert "warning" not in said
    assert_same_run(workdir, finished()[0])
    steps = [row["step"] for row in rows(workdir) if "train/bits_per_byte" in row]
    assert steps == list(range(1, 41))
    assert steps_kept(workdir) == [39, 40]
    assert not saving(workdir)  # the killed processes' leftovers are removed


def test_killed_twenty_times_at_random(forks, tmp_path, capsys):
    """At any moment, the next start resumes from a complete checkpoint, no older than the last one saved."""
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
