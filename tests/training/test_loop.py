"""A training run from start to end: its files, rows and options."""

import json
import math
import struct

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
from support import assert_close
from support.models import reference_logits
from support.runs import assert_same_run, finished, rows, text, tiny_config, write_text

pytestmark = pytest.mark.slow

# Files and rows


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
    assert set(train_rows[0]) == keys  # the speed is unknown before the second step
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
    assert len(windows) > 3  # more than the earlier validations use
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


# Own text


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


# Options


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
    watched = lambda generator, *_, **__: drawn.update(generator.parameters) or iter(())
    monkeypatch.setattr("osdn_jax.generation.Generator.stream", watched)
    assert list(generate(tmp_path / "whole")) == []
    assert_close(drawn, found["ema"], 0)


# Smallest and largest values

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


def test_a_run_in_which_every_count_is_the_largest(tmp_path):
    most = 2**31 - 1
    names = ["log_every", "hang_seconds", "max_skipped_steps", "data__shuffle_windows", "loss__sequence_chunk"]
    names += ["loss__vocabulary_chunk", "model__chunk_size", "validation__every", "validation__windows", "steps"]
    names += ["checkpoint__every", "checkpoint__keep", "checkpoint__keep_every"]
    changes = dict.fromkeys(names, most) | {"seed": 2**32 - 1, "optimizer__warmup_steps": most - 1}
    config = tiny_config(text(), **changes)
    assert train(config, tmp_path / "run", stop_at=1).step == 1
    assert train(config, tmp_path / "run", stop_at=2).step == 2


# Speed


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
