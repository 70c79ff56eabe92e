"""Reading checkpoints: damaged ones, ones of another model or text, and files that only look like one."""

import asyncio
import gc
import itertools
import logging
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from osdn_jax.training import checkpoints as checkpoints_module
from osdn_jax.training import distributed
from osdn_jax.training.checkpoints import (
    CheckpointError,
    CheckpointMismatchError,
    Checkpoints,
    load_parameters,
)
from osdn_jax.training.finishing_loop import finishing_loops
from support.checkpoints import array_file, assert_same_bits, flip, half, names, new_iterator, save, state_at

# Damaged files


@pytest.mark.slow
@pytest.mark.parametrize("damage", [half, flip, Path.unlink])
def test_falls_back_over_a_damaged_checkpoint_and_says_so(tmp_path, caplog, damage):
    save(tmp_path, 1, 2, 3)
    damage(array_file(tmp_path / "3"))
    iterator = new_iterator()
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        restored = checkpoints.restore(state_at(0), iterator)
        assert restored.step == 2
        assert restored.metadata == {"step": 2}
        assert_same_bits(restored.state, state_at(2))
        assert len(restored.warnings) == 1
        for text in ("checkpoint 3 cannot be read", "now 3.corrupt", "using step 2"):
            assert text in restored.warnings[0]
        assert restored.warnings[0] in caplog.text
        assert names(tmp_path) == ["1", "2", "3.corrupt"]
        checkpoints.save(3, state_at(3), iterator)  # training reaches this step again
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(state_at(0), iterator).state, state_at(3))
    half(array_file(tmp_path / "3"))
    with Checkpoints(tmp_path) as checkpoints:  # and the same again
        assert checkpoints.restore(state_at(0), iterator).step == 2
    assert names(tmp_path) == ["1", "2", "3.corrupt", "3.corrupt2"]


@pytest.mark.parametrize("damage", [half, Path.unlink])
def test_only_the_error_of_the_first_array_is_reported(tmp_path, monkeypatch, caplog, damage):
    """Python would report each of the others, with a traceback, if Orbax left it unfinished."""
    state = {"params": {f"kernel{i}": jax.random.normal(jax.random.key(i), (64, 64)) for i in range(40)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    damage(array_file(tmp_path / "1"))
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reports.append(str(report.exc_value)))
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        load_parameters(tmp_path, state["params"])
    gc.collect()
    assert reports == []
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize(("error", "finished"), [(KeyError("first"), ["None", "late"]), (KeyboardInterrupt(), [])])
def test_a_loop_finishes_what_was_begun_in_it_unless_it_is_interrupted(error, finished, caplog):
    ended = []

    async def slow(error):
        await asyncio.sleep(0.01)
        ended.append(str(error))
        if error:
            raise error

    async def fast(error):
        raise error

    async def together():
        await asyncio.gather(slow(None), slow(ValueError("late")), *map(fast, (error, ValueError("at the same time"))))

    original = asyncio.new_event_loop
    with finishing_loops():
        loop = asyncio.new_event_loop()
    assert asyncio.new_event_loop is original
    with pytest.raises(type(error)):
        try:
            loop.run_until_complete(together())
        finally:
            loop.close()
    assert ended == finished
    del loop
    gc.collect()
    if finished:
        assert [record.message for record in caplog.records if record.name == "asyncio"] == []


def test_whatever_file_is_damaged_the_result_is_a_checkpoint_that_was_saved(tmp_path):
    save(tmp_path / "good", 1, 2)
    files = [p.relative_to(tmp_path / "good") for p in (tmp_path / "good" / "2").rglob("*") if p.is_file()]
    assert len(files) > 8
    fallbacks = 0
    for file, damage in itertools.product(files, (half, Path.unlink)):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        damage(tmp_path / "bad" / file)
        with Checkpoints(tmp_path / "bad") as checkpoints:
            restored = checkpoints.restore(state_at(0), new_iterator())
        assert_same_bits(restored.state, state_at(restored.step))
        assert restored.metadata == {"step": restored.step}
        assert len(restored.warnings) == (restored.step == 1)
        fallbacks += restored.step == 1
        shutil.rmtree(tmp_path / "bad")
    assert fallbacks >= 8


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_a_newer_one(tmp_path, monkeypatch, caplog):
    save(tmp_path / "run", 1)
    save(tmp_path / "later", 2)
    read = checkpoints_module.read_checkpoint

    def removed_meanwhile(manager, folder, *arguments, **options):
        if folder.name == "1":  # as if training saved step 2 and kept only that
            array_file(folder).unlink()
            shutil.copytree(tmp_path / "later" / "2", tmp_path / "run" / "2")
        return read(manager, folder, *arguments, **options)

    monkeypatch.setattr(checkpoints_module, "read_checkpoint", removed_meanwhile)
    with caplog.at_level(logging.WARNING):
        step, parameters = load_parameters(tmp_path / "run", state_at(0)["params"])
    assert step == 2
    assert_same_bits(parameters, state_at(2)["params"])
    assert "cannot be read" not in caplog.text


def test_when_no_checkpoint_can_be_read_all_are_named_and_kept(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        half(array_file(tmp_path / step))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read:\n  2: .*\n  1: "):
            checkpoints.restore(state_at(0))
        with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
            load_parameters(tmp_path, state_at(0)["params"])
    assert names(tmp_path) == ["1", "2"]


def test_an_emptied_checkpoint_is_a_damaged_one(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "2").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state_at(0)).step == 1
    assert names(tmp_path) == ["1", "2.corrupt"]


def test_a_failed_read_leaves_the_iterator_where_it_was(tmp_path):
    iterator = new_iterator()
    for _ in range(5):
        next(iterator)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1), iterator)
    half(array_file(tmp_path / "1"))
    fresh = new_iterator()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError):
        checkpoints.restore(state_at(0), fresh)
    assert fresh.get_state() == new_iterator().get_state()


# Another model


def with_params(state, **params):
    return state | {"params": state["params"] | params}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda s: with_params(s, embed=jnp.ones((9, 32), jnp.float32)),
            r"params/embed: float32\[64, 32\] in the checkpoint, float32\[9, 32\] expected",
        ),
        (
            lambda s: with_params(s, embed=s["params"]["embed"].astype(jnp.bfloat16)),
            r"params/embed: float32\[64, 32\] in the checkpoint, bfloat16\[64, 32\] expected",
        ),
        (
            lambda s: with_params(s, head=jnp.ones(3, jnp.float32)),
            r"params/head: absent in the checkpoint, float32\[3\] expected",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "rng"},
            r"rng: uint32\[2\] in the checkpoint, absent expected",
        ),
        (
            lambda s: s | {"opt_state": optax.sgd(1.0).init(s["params"])},
            r"opt_state/0/count: int32\[\] in the checkpoint, absent expected",
        ),
    ],
    ids=["shape", "dtype", "new array", "array gone", "another optimiser"],
)
def test_another_model_is_refused_by_name_and_nothing_is_moved(tmp_path, change, said):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=said) as error:
        checkpoints.restore(change(state_at(0)))
    assert isinstance(error.value, CheckpointMismatchError)
    assert "arrays differ" in str(error.value)
    assert names(tmp_path) == ["1", "2"]


def test_many_differences_are_counted_not_listed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {f"w{i}": jnp.ones(2) for i in range(20)})
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"20 of 20 arrays differ") as error:
            checkpoints.restore({f"w{i}": jnp.ones(3) for i in range(20)})
    assert str(error.value).count("\n") == 6
    assert "and 15 more" in str(error.value)


def test_a_checkpoint_without_an_iterator_says_so(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.wait()
        with pytest.raises(CheckpointMismatchError, match="without the state of a data iterator"):
            checkpoints.restore(state_at(0), new_iterator())


# Another text or tokenizer


def save_with(folder, *steps, **fingerprints):
    with Checkpoints(folder, fingerprints=fingerprints) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step))


def test_a_checkpoint_with_other_fingerprints_is_refused_by_name(tmp_path):
    save_with(tmp_path, 1, 2, text="a" * 40, tokenizer="b" * 40)
    for here, said in {
        ("c" * 40, "b" * 40): r"2 was trained with another text \(text aaaaaaaaaaaa there, cccccccccccc now\)",
        ("a" * 40, "c" * 40): "2 was trained with another tokenizer",
        ("c" * 40, "c" * 40): "2 was trained with another text and another tokenizer",
    }.items():
        iterator = new_iterator()
        with Checkpoints(tmp_path, fingerprints={"text": here[0], "tokenizer": here[1]}) as checkpoints:
            with pytest.raises(CheckpointMismatchError, match=said) as error:
                checkpoints.restore(state_at(0), iterator)
            assert "\n" not in str(error.value)
        assert iterator.get_state() == new_iterator().get_state()
    with pytest.raises(CheckpointMismatchError, match="another tokenizer"):
        load_parameters(tmp_path, state_at(0)["params"], fingerprints={"tokenizer": "c" * 40})
    assert load_parameters(tmp_path, state_at(0)["params"], fingerprints={"tokenizer": "b" * 40})[0] == 2
    assert names(tmp_path) == ["1", "2"]


def test_another_tokenizer_is_named_before_the_arrays_that_it_changes(tmp_path):
    save_with(tmp_path, 1, tokenizer="b" * 40)
    with Checkpoints(tmp_path, fingerprints={"tokenizer": "c" * 40}) as checkpoints:
        with pytest.raises(CheckpointMismatchError, match="another tokenizer"):
            checkpoints.restore(state_at(0, width=9))


def test_a_checkpoint_without_fingerprints_is_taken_with_a_warning(tmp_path, caplog):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path, fingerprints={"text": "a" * 40, "tokenizer": "b" * 40}) as checkpoints:
        restored = checkpoints.restore(state_at(0))
        assert restored.step == 2
        (warning,) = restored.warnings
        assert warning == "checkpoint 2 has no fingerprint of its text and tokenizer: taken to be the same as now"
        checkpoints.save(3, state_at(3))
        checkpoints.wait()
        assert checkpoints.restore(state_at(0)).warnings == ()
    assert load_parameters(tmp_path, state_at(0)["params"], step=2, fingerprints={"tokenizer": "b"})[0] == 2
    assert "has no fingerprint of its tokenizer" in caplog.text


# Names like those of checkpoints


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "moved"),
    [
        (lambda folder: (folder / "100").symlink_to("2"), "100.link"),
        (lambda folder: (folder / "0").symlink_to(folder / "2"), "0.link"),
        (lambda folder: (folder / "3").symlink_to("2"), "3.link"),
        (lambda folder: (folder / "3").symlink_to("7"), "3.link"),
        (lambda folder: (folder / "3").write_text("three"), "3.file"),
        (lambda folder: shutil.copytree(folder / "2", folder / "100"), "100.corrupt"),
    ],
    ids=["a later step", "an earlier step", "the next step", "to nothing", "a file", "a copy"],
)
def test_what_is_named_like_a_checkpoint_is_moved_aside_and_saving_goes_on(tmp_path, make, moved):
    save(tmp_path, 1, 2)
    (tmp_path / "latest").symlink_to("2")
    (tmp_path / "best").symlink_to("7")
    make(tmp_path)
    with Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
        restored = checkpoints.restore(state_at(0))
        assert restored.step == 2
        assert_same_bits(restored.state, state_at(2))
        assert [moved in warning for warning in restored.warnings] == [True]
        for step in (3, 4):
            checkpoints.save(step, state_at(step))
    assert names(tmp_path) == sorted(["3", "4", "best", "latest", moved])


def test_a_checkpoint_that_is_a_link_to_elsewhere_is_named_and_left_alone(tmp_path):
    save(tmp_path / "run", 1, 2)
    shutil.move(tmp_path / "run" / "2", tmp_path / "elsewhere")
    (tmp_path / "run" / "2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="run/2 is a link to .*elsewhere; put the folder itself there"):
        Checkpoints(tmp_path / "run")
    assert names(tmp_path / "run") == ["1", "2"]
    (tmp_path / "run" / "2").unlink()
    shutil.move(tmp_path / "elsewhere", tmp_path / "run" / "2")
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.restore(state_at(0)).step == 2


@pytest.mark.parametrize("first", [True, False])
def test_an_error_of_the_first_process_is_raised_in_every_one(tmp_path, monkeypatch, first):
    """No process waits for the other."""
    save(tmp_path / "run", 1)
    (tmp_path / "run" / "2").symlink_to(tmp_path)
    monkeypatch.setattr(distributed, "is_primary", lambda: first)
    monkeypatch.setattr(distributed, "all_processes", lambda here: False)
    words = "is a link to" if first else "process 0 cannot use .*run; its own message says why"
    with pytest.raises(CheckpointError, match=words):
        Checkpoints(tmp_path / "run")
