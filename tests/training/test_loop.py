"""A training run from its start to its end: what it writes, and what it refuses."""

import json
import math
import struct
import threading

import jax
import numpy as np
import pytest

from osdn_jax.data import PackedWindows, validation_batches
from osdn_jax.evaluation import make_evaluate
from osdn_jax.generate import generate
from osdn_jax.hardware import peak_flops
from osdn_jax.nn import parameter_formula
from osdn_jax.nn.flops import per_token
from osdn_jax.nn.split import split_model
from osdn_jax.training import (
    ConfigError,
    DivergedError,
    WorkdirConfigError,
    build_corpus,
    build_model,
    build_model_config,
    build_schedule,
    load_config,
    load_parameters,
    loop,
    read_metrics,
    train,
)
from osdn_jax.training import events as event_files
from support import assert_close
from support.models import reference_logits
from support.runs import assert_same_run, finished, rows, text, tiny_config, write_text

# What a run writes


def test_the_files_of_a_run():
    workdir, result = finished()
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "loss.png",
    }
    assert load_config(workdir).to_dict() == json.loads(json.dumps(tiny_config(text()).to_dict()))
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"30", "40"}  # the last two
    assert [path.name.startswith("events.out.tfevents") for path in (workdir / "tensorboard").iterdir()] == [True]
    header = (workdir / "loss.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1200, 750)
    assert result.step == 40
    assert result.parameters == parameter_formula(build_model_config(tiny_config(text())))


def test_the_rows_of_a_run():
    workdir, result = finished()
    all_rows = read_metrics(workdir)
    train_rows = [row for row in all_rows if "train/bits_per_byte" in row]
    validation_rows = [row for row in all_rows if "validation/bits_per_byte" in row]
    assert len(train_rows) + len(validation_rows) == len(all_rows)
    assert [row["step"] for row in train_rows] == list(range(1, 41))
    assert [row["step"] for row in validation_rows] == [20, 40]
    norms = {"train/gradient_norm", "train/update_norm", "train/parameter_norm"}
    keys = {"step", "tokens", "train/bits_per_byte", "train/skipped_steps", "train/learning_rate"} | norms
    assert set(train_rows[0]) == keys  # nothing is known of the speed before the second step
    assert {frozenset(row) for row in train_rows[1:]} == {frozenset(keys | {"tokens_per_second"})}
    statistics = {f"preconditioner/{name}" for name in ("mean", "min", "max", "clipped")}
    validated = {"step", "tokens", "validation/bits_per_byte"} | statistics
    assert {frozenset(row) for row in validation_rows} == {frozenset(validated)}
    schedule = build_schedule(tiny_config(text()))
    for row in all_rows:
        assert row["tokens"] == row["step"] * 2 * 24
        assert all(math.isfinite(value) for value in row.values())
    rates = [row["train/learning_rate"] for row in train_rows]
    np.testing.assert_allclose(rates, [schedule(step) for step in range(40)], rtol=1e-6)
    assert rates[0] == 0.0  # the rate that a step used, not the next one's
    assert abs(train_rows[0]["train/bits_per_byte"] - 8) < 0.2
    assert result.bits_per_byte == validation_rows[-1]["validation/bits_per_byte"]
    assert result.bits_per_byte < validation_rows[0]["validation/bits_per_byte"] < 7  # it learns
    assert result.tokens_per_second > 0


def test_the_last_validation_is_of_every_byte_by_the_final_parameters():
    workdir, result = finished()
    config = tiny_config(text())
    _, parameters = split_model(build_model(config))
    _, parameters = load_parameters(workdir / "checkpoints", parameters)
    _, held_out = build_corpus(config)
    windows = PackedWindows(held_out, config.validation.sequence_length)
    assert len(windows) > 3  # more than the validations before it take
    nats, count = 0.0, 0
    for window in windows:
        inputs, ids = window["inputs"][None], window["segment_ids"][None]
        logits = reference_logits(build_model_config(config), parameters, inputs, ids)[0]
        likelihood = np.take_along_axis(logits, window["targets"][:, None], -1)[:, 0] - np.log(np.exp(logits).sum(-1))
        nats -= (likelihood * window["weights"]).sum()
        count += int(window["weights"].sum())
    assert count == sum(len(document.text) for document in held_out)
    np.testing.assert_allclose(result.bits_per_byte, nats / count / np.log(2), rtol=1e-5)


def test_the_same_seed_is_the_same_run_and_another_is_another(tmp_path):
    workdir, _ = finished()
    train(tiny_config(text()), tmp_path / "same")
    assert_same_run(tmp_path / "same", workdir)
    train(tiny_config(text(), seed=1), tmp_path / "other", stop_at=3)
    for a, b in zip(rows(tmp_path / "other"), rows(workdir), strict=False):
        assert a["train/bits_per_byte"] != b["train/bits_per_byte"]


def test_looking_less_often_changes_nothing_else(tmp_path):
    workdir, _ = finished()
    config = tiny_config(text(), log_every=7, checkpoint__every=100, validation__every=15)
    result = train(config, tmp_path / "run")
    got = rows(tmp_path / "run")
    assert [(row["step"], "train/bits_per_byte" in row) for row in got] == [
        (7, True), (14, True), (15, False), (21, True), (28, True), (30, False), (35, True), (40, True), (40, False),
    ]  # fmt: skip
    assert [row for row in got if row["step"] not in (15, 30)] == [
        row for row in rows(workdir) if row["step"] in (7, 14, 21, 28, 35, 40)
    ]
    assert result.bits_per_byte == finished()[1].bits_per_byte
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"40"}


def test_windows_of_a_part_are_spread_over_the_whole():
    source = PackedWindows(build_corpus(tiny_config(text()))[1], 48)
    total = len(source)
    for count, want in ((3, [i * total // 3 for i in range(3)]), (0, range(total)), (total + 1, range(total))):
        batches = list(loop._spread(source, count, 2))
        got = np.concatenate([batch["inputs"] for batch in batches])
        np.testing.assert_array_equal(got[: len(want)], [source[i]["inputs"] for i in want])
        assert len(got) - len(want) in (0, 1)


def test_what_is_printed(tmp_path, capsys):
    train(tiny_config(text()), tmp_path / "run", stop_at=20)
    said = capsys.readouterr().out
    assert "osdn: 6,218 parameters; 0.00 MB of text" in said
    assert "step 20: " in said
    assert "on part of the held-out text" in said
    train(tiny_config(text()), tmp_path / "run")
    said = capsys.readouterr().out
    assert "going on from the checkpoint of step 20 of 40" in said
    assert "on all of the held-out text" in said


# Text of one's own


@pytest.mark.parametrize("kind", [".txt", ".jsonl", "folder"])
def test_trains_on_text_of_ones_own(tmp_path, kind):
    path = tmp_path / "data"
    if kind == "folder":
        path.mkdir()
        for seed in range(2):
            write_text(path / f"{seed}.txt", words=300, seed=seed)
    elif kind == ".jsonl":
        path = path.with_suffix(kind)
        lines = write_text(tmp_path / "lines.txt").read_text().splitlines()
        path.write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    else:
        path = write_text(path.with_suffix(kind))
    result = train(tiny_config(path, data__field="body"), tmp_path / "run")
    assert (result.step, rows(tmp_path / "run")[-1]["step"]) == (40, 40)
    assert result.bits_per_byte < 6


# Numbers that are none


def poisoned(monkeypatch, at):
    """Batches of training whose steps `at`, one or several, have no finite loss."""
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

    # A checkpoint wants grain's own iterator.
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
        train(config, tmp_path / "run")  # without the poison, as if nothing had been
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


# What else a run may do


def test_a_run_with_everything_on_goes_on_where_it_stopped(tmp_path, monkeypatch):
    config = tiny_config(
        text(),
        steps=8,
        batch_size=4,
        accumulate=2,
        ema=0.5,
        loss__sequence_chunk=10,
        loss__vocabulary_chunk=100,
        loss__z_loss=1e-4,
        model__rule="linear_attention",
        model__remat="blocks",
        model__dtype="bfloat16",
        model__dropout=0.1,
        optimizer__name="muon",
        optimizer__muon_learning_rate=0.01,
        validation__every=4,
        checkpoint__every=4,
    )
    train(config, tmp_path / "whole")
    train(config, tmp_path / "halves", stop_at=4)
    result = train(config, tmp_path / "halves")
    assert_same_run(tmp_path / "halves", tmp_path / "whole", step=8)
    apply, parameters = split_model(build_model(config))
    found = {
        key: load_parameters(tmp_path / "whole" / "checkpoints", parameters, key=key)[1] for key in ("params", "ema")
    }
    _, held_out = build_corpus(config)
    windows = validation_batches(PackedWindows(held_out, 48), batch_size=2)
    bits = {key: make_evaluate(apply)(p, windows) for key, p in found.items()}
    np.testing.assert_allclose(result.bits_per_byte, bits["ema"], rtol=1e-3)
    assert abs(bits["params"] - bits["ema"]) > 0.01
    drawn = {}
    monkeypatch.setattr("osdn_jax.generate.sample", lambda apply, p, *_, **__: drawn.update(p) or iter(()))
    assert list(generate(tmp_path / "whole")) == [""]
    assert_close(drawn, found["ema"], 0)


# The smallest and the largest

ONES = {
    "batch_size": 1,
    "sequence_length": 1,
    "log_every": 1,
    "hang_seconds": 600,
    "max_skipped_steps": 0,
    "data__shuffle_windows": 1,
    "loss__sequence_chunk": 1,
    "loss__vocabulary_chunk": 1,
    "model__width": 1,
    "model__heads": 1,
    "model__key_heads": 1,
    "model__value_dim": 1,
    "model__mlp_dim": 1,
    "model__chunk_size": 1,
    "optimizer__warmup_steps": 0,
    "validation__every": 1,
    "validation__windows": 1,
    "validation__batch_size": 1,
    "validation__sequence_length": 1,
    "checkpoint__every": 1,
    "checkpoint__keep": 1,
    "checkpoint__keep_every": 1,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1, "model__key_dim": 1, "model__conv_size": 1},
        {"steps": 2, "model__rule": "transformer", "model__key_dim": 2, "model__max_length": 1},
    ],
    ids=["osdn", "transformer"],
)
def test_a_run_in_which_everything_is_one(tmp_path, changes):
    path = tmp_path / "one.txt"
    path.write_text("ab cd\n")
    config = tiny_config(path, **ONES | changes, data__validation_fraction=0.4)
    result = train(config, tmp_path / "run")
    assert result.step == config.steps
    assert abs(result.bits_per_byte - 8) < 1
    assert (tmp_path / "run" / "loss.png").exists()
    assert train(config, tmp_path / "run").bits_per_byte == result.bits_per_byte


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


def test_a_run_in_which_every_count_is_the_largest(tmp_path):
    most = 2**31 - 1
    names = ["log_every", "hang_seconds", "max_skipped_steps", "data__shuffle_windows", "loss__sequence_chunk"]
    names += ["loss__vocabulary_chunk", "model__chunk_size", "validation__every", "validation__windows", "steps"]
    names += ["checkpoint__every", "checkpoint__keep", "checkpoint__keep_every"]
    changes = dict.fromkeys(names, most) | {"seed": 2**32 - 1, "optimizer__warmup_steps": most - 1}
    config = tiny_config(text(), **changes)
    assert train(config, tmp_path / "run", stop_at=1).step == 1
    assert train(config, tmp_path / "run", stop_at=2).step == 2


# A disk that is full


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
    """Every process asks the others; what they answer is made up here."""
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


# What is refused


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


def test_mfu_where_the_peak_is_known(tmp_path, monkeypatch):
    """FLOPs by formula times the speed over the peak of all devices."""
    monkeypatch.setattr(loop, "peak_flops", lambda kind: 1e9)
    config = tiny_config(text(), steps=6, validation__every=6, mesh__data=2, model__rule="linear_attention")
    train(config, tmp_path / "run")
    model = build_model_config(config)
    flops = per_token(model, split_model(build_model(config))[1], config.sequence_length).training
    measured = [row for row in read_metrics(tmp_path / "run") if "tokens_per_second" in row]
    assert len(measured) == 5
    for row in measured:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 2e9)


def test_peaks_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.5e12
    assert peak_flops("cpu") is None
