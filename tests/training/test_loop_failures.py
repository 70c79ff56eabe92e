"""Runs that cannot start or continue: numbers that are not finite, memory, full disks, refused arguments."""

import threading

import jax
import numpy as np
import pytest

from osdn_jax.training import (
    ConfigError,
    DivergedError,
    WorkdirConfigError,
    build_schedule,
    loop,
    train,
)
from osdn_jax.training import events as event_files
from support.runs import assert_same_run, finished, rows, text, tiny_config

pytestmark = pytest.mark.slow

# Numbers that are not finite


def poisoned(monkeypatch, at):
    """Make the loss of the training steps `at`, one or several, not finite."""
    real = loop.training_batches

    class Poisoned:
        def __init__(self, iterator):
            self.iterator, self.step = iterator, 0

        def __next__(self):
            self.step += 1
            batch = next(self.iterator)
            return (
                batch | {"weights": batch["weights"] * np.float32("nan")} if self.step in np.atleast_1d(at) else batch
            )

        def __getattr__(self, name):
            return getattr(self.iterator, name)

    # A checkpoint needs Grain's iterator itself.
    monkeypatch.setattr(loop, "training_batches", lambda *args, **options: Poisoned(real(*args, **options)))
    save, restore = loop.Checkpoints.save, loop.Checkpoints.restore
    monkeypatch.setattr(loop.Checkpoints, "save", lambda self, step, state, it: save(self, step, state, it.iterator))
    monkeypatch.setattr(loop.Checkpoints, "restore", lambda self, state, it: restore(self, state, it.iterator))


@pytest.mark.parametrize(
    ("at", "log_every", "kept"),
    [
        (25, 1, "the checkpoint of step 20 is kept"),
        (25, 100, "20 is kept"),
        (30, 100, "20 is kept"),
        (2, 1, "no checkpoint"),
    ],
)
def test_stops_where_the_loss_is_no_number_and_keeps_what_was_good(tmp_path, monkeypatch, at, log_every, kept):
    config = tiny_config(text(), log_every=log_every, max_skipped_steps=0)
    with monkeypatch.context() as patch:
        poisoned(patch, at)
        with pytest.raises(DivergedError, match=f"^step {at}: .*loss is nan.*{kept}.*learning_rate") as error:
            train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert all(row["step"] < at for row in rows(tmp_path / "run"))
    if at == 30:
        assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"10", "20"}
        train(config, tmp_path / "run")  # without the poison: continues normally
        assert rows(tmp_path / "run")[-1] == rows(finished()[0])[-1]


def test_a_step_without_a_finite_loss_is_skipped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch, range(4, 7))
        train(tiny_config(text(), max_skipped_steps=3, steps=12), tmp_path / "run")
    train_rows = [row for row in rows(tmp_path / "run") if "train/skipped_steps" in row]
    assert [row["train/skipped_steps"] for row in train_rows] == [0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert [row["train/bits_per_byte"] is None for row in train_rows] == [3 < row["step"] < 7 for row in train_rows]
    assert len({row["train/parameter_norm"] for row in train_rows[2:6]}) == 1
    schedule = build_schedule(tiny_config(text(), steps=12))
    np.testing.assert_allclose(train_rows[-1]["train/learning_rate"], schedule(12 - 1 - 3), rtol=1e-6)


def test_stops_where_skipping_does_not_help(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poisoned(patch, [6, *range(12, 40)])
        said = r"^step 15: .*loss is nan.* makes 4 skipped in a row \(max_skipped_steps = 3\).*step 10 is kept"
        with pytest.raises(DivergedError, match=said):
            train(tiny_config(text(), max_skipped_steps=3), tmp_path / "run")
    assert rows(tmp_path / "run")[-1]["step"] == 14


# Out of memory


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"batch_size": 2**31 - 1},
            "batch_size × sequence_length: got 2147483647 × 24, 824 GB in a batch, expected less",
        ),
        ({"sequence_length": 2**31 - 1, "batch_size": 100}, "batch_size × sequence_length: got 100 × 2147483647"),
        ({"validation__sequence_length": 2**31 - 1, "validation__batch_size": 100}, "validation.batch_size × validat"),
        ({"model__width": 2**31 - 1, "model__heads": 1}, "model: got .* parameters, .* GB, expected less than the"),
        ({"model__layers": 2**31 - 1}, "model: got .* parameters"),
        ({"model__vocab_size": 2**31 - 1}, "model: got .* parameters"),
        ({"model__conv_size": 2**31 - 1}, "model: got .* parameters"),
    ],
)
def test_what_no_memory_holds_is_refused_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=f"^{said}") as error:
        train(tiny_config(text(), **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4 bytes.\nBuffers"), "allocating 4"),
        (MemoryError(), "out of memory: MemoryError. A smaller batch_size"),
    ],
)
def test_memory_that_runs_out_is_one_line(tmp_path, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "_next", fail)
    with pytest.raises(ConfigError, match=said) as raised:
        train(tiny_config(text()), tmp_path / "run")
    assert "\n" not in str(raised.value)


# A full disk


def test_a_full_disk_of_event_files_does_not_stop_training(tmp_path, monkeypatch, caplog):
    finished()  # before the disk is full
    real = event_files.RecordWriter
    monkeypatch.setattr(event_files, "RecordWriter", lambda path: real("/dev/full"))
    monkeypatch.setattr(event_files, "_FLUSH_SECONDS", -1)
    thread = threading.Thread(target=train, args=(tiny_config(text()), tmp_path / "run"), daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive(), "it hangs"
    assert rows(tmp_path / "run") == rows(finished()[0])
    (record,) = caplog.records
    assert "no more TensorBoard events" in record.getMessage()


def test_a_damaged_line_of_metrics_is_named_and_nothing_is_lost(tmp_path):
    train(tiny_config(text()), tmp_path / "run", stop_at=10)
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:4], '{"step": 5, "train/bi\n', *lines[5:]]))
    damaged = file.read_text()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 5 is not JSON: .*; mend or remove that line") as error:
        train(tiny_config(text()), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert file.read_text() == damaged
    file.write_text("".join(lines))
    train(tiny_config(text()), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished()[0])


@pytest.mark.parametrize("first", [True, False])
def test_metrics_that_the_first_process_cannot_open_end_all(tmp_path, monkeypatch, first):
    """Every process asks the others; their answers are simulated."""
    reports = []

    def settle(description, reason):
        reports.append(reason)
        raise ConfigError(f"process 0 failed: {reason}")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.agreement, "_settle", settle)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="process 0 failed"):
        loop._metrics(tmp_path, 0, first)
    assert len(reports) == 1
    assert (reports[0] is None) != first


# Refused arguments


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"log_every": 0}, "log_every: got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"sequence_length": 0}, "sequence length must be at least 1; got 0"),
        ({"seed": -1}, "seed"),
        ({"validation__every": 0}, "validation.every: got 0"),
        ({"validation__sequence_length": 0}, "sequence length must be at least 1; got 0"),
        ({"validation__batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"checkpoint__every": 0}, "checkpoint.every: got 0"),
        ({"checkpoint__keep": 0}, "checkpoint.keep: got 0"),
        ({"optimizer__warmup_steps": 40}, "optimizer.warmup_steps: got 40"),
        ({"optimizer__clip_norm": 0.0}, "optimizer.clip_norm: got 0.0"),
        ({"accumulate": 4}, "accumulate: got 4, expected a divisor of batch_size = 2"),
        ({"max_skipped_steps": -1}, "max_skipped_steps: got -1, expected at least 0"),
        ({"model__heads": 3}, "model.heads: got 3, expected a divisor of model.width = 16"),
        ({"model__layers": 0}, "layers: got 0"),
        ({"model__rule": "rnn"}, "rule: got 'rnn', expected one of delta_net"),
        ({"model__dropout": 1.0}, "dropout: got 1.0"),
        ({"model__implementation": "magic"}, "implementation: got 'magic'"),
        ({"data__validation_fraction": 1.0}, "validation_fraction must be between 0 and 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, said, our_checks):
    with pytest.raises(ConfigError, match=said) as error:
        train(tiny_config(text(), **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_read_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "letter.txt").write_text("a")
    for name, said in {
        "missing.txt": "no such file or folder: .*missing.txt",
        "empty": "empty holds no supported file",
        "binary.txt": "binary.txt is not text: NUL byte at byte offset 0",
        "picture.png": "unsupported file .*picture.png",
        "blank.txt": "blank.txt holds no text",
        "letter.txt": "cannot hold out 0.1 of 1 bytes",
    }.items():
        with pytest.raises(ConfigError, match=said):
            train(tiny_config(tmp_path / name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_of_another_run_is_refused(tmp_path):
    config = tiny_config(text())
    train(config, tmp_path / "run", stop_at=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config.model.rule, config.seed = "kda", 1
    with pytest.raises(WorkdirConfigError, match="another configuration") as error:
        train(config, tmp_path / "run")
    for line in ("model.rule: 'osdn' there, 'kda' now", "seed: 0 there, 1 now"):
        assert line in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_stop_below_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stop_at: got 0"):
        train(tiny_config(text()), tmp_path / "run", stop_at=0)
