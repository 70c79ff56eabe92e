"""Checkpoints: bit-exact, atomic, and never silently anything but what was saved."""

import gc
import itertools
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from osdn_jax.training import distributed
from osdn_jax.training.checkpoints import (
    CheckpointError,
    CheckpointMismatchError,
    Checkpoints,
    load_parameters,
)

# Orbax leaves its other reads unawaited when one fails; Python says so whenever it collects them, which is made to be
# here and not in some later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_unawaited_reads():
    yield
    gc.collect()


def state_at(step, width=64):
    """A training state with every kind of leaf and container; incompressible, and another one at each step."""
    key = jax.random.key(step)
    params = {
        "embed": jax.random.normal(key, (width, 32), jnp.float32),
        "layers": [{"kernel": jax.random.normal(key, (32, 8), jnp.bfloat16)}, {"kernel": jnp.ones((2, 3))}],
    }
    return {
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "step": jnp.int32(step),
        "rng": jax.random.key_data(key),
        "mask": jnp.arange(7) % 2 == 0,
        "nan": jnp.array([jnp.nan, -0.0, jnp.inf], jnp.float32),
        "half": jnp.array([[1.5]], jnp.float16),
        "byte": jnp.array([-3], jnp.int8),
    }


def new_iterator():
    return iter(grain.MapDataset.range(1000).shuffle(seed=3).repeat().to_iter_dataset())


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(x, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(folder, *steps, **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), new_iterator(), {"step": step})


def names(folder):
    return sorted(entry.name for entry in Path(folder).iterdir())


# Saving and restoring


def test_empty_folder_restores_nothing_and_leaves_the_iterator(tmp_path):
    iterator = new_iterator()
    first = next(new_iterator())
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.restore(state_at(0), iterator) is None
        assert checkpoints.latest_step is None
    assert next(iterator) == first


def test_round_trip_is_bit_exact(tmp_path):
    iterator = new_iterator()
    taken = [next(iterator) for _ in range(5)]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state_at(7), iterator, {"tokens": 123, "name": "ö"})
        rest = [next(iterator) for _ in range(5)]  # moves on while the save is under way
    with Checkpoints(tmp_path) as checkpoints:
        again = new_iterator()
        restored = checkpoints.restore(shapes(state_at(0)), again)
    assert restored.step == 7
    assert restored.metadata == {"tokens": 123, "name": "ö"}
    assert restored.warnings == ()
    assert_same_bits(restored.state, state_at(7))
    assert [next(again) for _ in range(5)] == rest != taken


def test_random_state_goes_on_where_it_was(tmp_path):
    save(tmp_path, 7)
    with Checkpoints(tmp_path) as checkpoints:
        key = jax.random.wrap_key_data(checkpoints.restore(state_at(0)).state["rng"])
    assert jax.random.normal(key, (3,)).tolist() == jax.random.normal(jax.random.key(7), (3,)).tolist()


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000)), "v": jnp.arange(100_000)}
    want = jax.tree.map(lambda x: np.array(x), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        jax.block_until_ready(overwrite(state))
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(shapes(want)).state, jax.tree.map(jnp.asarray, want))


def test_keeps_the_newest_and_every_period(tmp_path):
    save(tmp_path, 10, 11, 12, 13, 20, 21, max_to_keep=2, keep_period=10)
    assert names(tmp_path) == ["10", "20", "21"]


@pytest.mark.parametrize("options", [{"max_to_keep": 0}, {"keep_period": 0}])
def test_keeping_less_than_one_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least 1"):
        Checkpoints(tmp_path, **options)


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state_at(5))
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"cannot save step {step}.*already holds step 5"):
                checkpoints.save(step, state_at(step))


def test_what_is_no_array_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="opt/count is a int"):
            checkpoints.save(1, {"opt": {"count": 3}})
        with pytest.raises(TypeError, match="rng is a typed random key.*key_data"):
            checkpoints.save(1, {"rng": jax.random.key(0)})
        with pytest.raises(TypeError, match=r"empty has no elements \(shape \(0, 3\)\)"):
            checkpoints.save(1, {"empty": jnp.zeros((0, 3))})
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(1, state_at(1), metadata={"a": object()})
        with pytest.raises(TypeError, match="opt/count is a int"):
            checkpoints.restore({"opt": {"count": 3}})
    assert names(tmp_path) == []


def test_restores_onto_the_shardings_of_the_target(tmp_path):
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    columns = jax.sharding.NamedSharding(mesh, jax.P(None, "data"))
    w = jax.random.normal(jax.random.key(0), (6, 4))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(w, rows)})
        checkpoints.wait()
        target = {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=columns)}
        got = checkpoints.restore(target).state
    assert got["w"].sharding == columns
    assert_same_bits(got, {"w": w})


def test_the_terminal_stays_clean(tmp_path, capfd):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(state_at(0), new_iterator())
    load_parameters(tmp_path, state_at(0)["params"])
    assert capfd.readouterr() == ("", "")


# A process that is killed

WRITER = """
    import sys
    import jax.numpy as jnp
    from osdn_jax.training.checkpoints import Checkpoints

    with Checkpoints(sys.argv[1], max_to_keep=None) as checkpoints:
        for step in range(1, 100):
            w = jnp.full((1000, 1000), step, jnp.int32) + jnp.arange(1000, dtype=jnp.int32)[None]
            checkpoints.save(step, {"w": w, "step": jnp.int32(step)})
            checkpoints.wait()
            print(step, flush=True)
"""


def writing(folder):
    """What the folder of the checkpoint under way holds, as one sees it from outside; None before and after."""
    for entry in folder.glob("*tmp*"):
        return {path.name for path in entry.rglob("*")}
    return None


@pytest.mark.parametrize(
    "moment",
    [
        lambda inside: inside is not None,
        lambda inside: inside is not None and "d" in inside,
        lambda inside: inside is not None and "_METADATA" in inside,
    ],
    ids=["folder made", "arrays under way", "arrays written"],
)
def test_a_killed_save_leaves_the_checkpoint_before_it(tmp_path, moment, request):
    folder = tmp_path / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(request.config.rootpath), "JAX_PLATFORMS": "cpu"},
    )
    try:
        complete = int(process.stdout.readline())
        end = time.monotonic() + 30
        while time.monotonic() < end and not moment(writing(folder)):
            pass
        process.send_signal(signal.SIGKILL)
        complete = max([complete, *map(int, process.stdout.read().split())])
    finally:
        process.kill()
        process.wait()
    assert complete < 99, "the writer was through before it was killed"
    target = {"w": jnp.zeros((1000, 1000), jnp.int32), "step": jnp.int32(0)}
    with Checkpoints(folder, max_to_keep=None) as checkpoints:
        restored = checkpoints.restore(target)
        assert restored.step in (complete, complete + 1)  # killed between the rename and the report of it
        assert restored.warnings == ()
        assert int(restored.state["step"]) == restored.step
        assert (np.asarray(restored.state["w"]) == restored.step + np.arange(1000)[None]).all()
        checkpoints.save(restored.step + 1, target)
    assert names(folder) == sorted(str(step) for step in range(1, restored.step + 2))


# Damaged files


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def array_file(folder):
    """The file that holds most of the arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


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
        checkpoints.save(3, state_at(3), iterator)  # training gets there again
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(state_at(0), iterator).state, state_at(3))
    half(array_file(tmp_path / "3"))
    with Checkpoints(tmp_path) as checkpoints:  # and the same again
        assert checkpoints.restore(state_at(0), iterator).step == 2
    assert names(tmp_path) == ["1", "2", "3.corrupt", "3.corrupt2"]


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


# What is named like a checkpoint


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
    """Neither waits for the other."""
    save(tmp_path / "run", 1)
    (tmp_path / "run" / "2").symlink_to(tmp_path)
    monkeypatch.setattr(distributed, "is_primary", lambda: first)
    monkeypatch.setattr(distributed, "all_processes", lambda here: False)
    words = "is a link to" if first else "process 0 cannot use .*run; its own message says why"
    with pytest.raises(CheckpointError, match=words):
        Checkpoints(tmp_path / "run")


# A save that fails


@pytest.fixture
def full_disk():
    """Files can grow to 100 kB only: a real error of the operating system in the background thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_save_is_an_error_and_the_last_checkpoint_stays(tmp_path, full_disk, caplog):
    checkpoints = Checkpoints(tmp_path, max_to_keep=1)
    checkpoints.save(1, state_at(1, width=5000))
    checkpoints.wait()
    full_disk(True)
    checkpoints.save(2, state_at(2, width=5000))
    with pytest.raises(
        CheckpointError, match="saving checkpoint 2 .* failed.* newest complete checkpoint is step 1.*too large"
    ):
        checkpoints.wait()
    full_disk(False)
    assert [record for record in caplog.records if "orbax" in record.pathname] == []  # one error, not four tracebacks
    assert checkpoints.all_steps() == [1]
    assert_same_bits(checkpoints.restore(state_at(0, width=5000)).state, state_at(1, width=5000))
    checkpoints.save(2, state_at(2, width=5000))  # once there is room again
    checkpoints.close()
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore(state_at(0, width=5000)).state, state_at(2, width=5000))


def test_leaving_the_context_reports_a_failed_save_but_hides_no_exception(tmp_path, full_disk, caplog):
    with (
        pytest.raises(CheckpointError, match="saving checkpoint 1 .* no complete checkpoint"),
        Checkpoints(tmp_path) as c,
    ):
        full_disk(True)
        c.save(1, state_at(1, width=5000))
    with pytest.raises(KeyError, match="mine"), Checkpoints(tmp_path) as c:
        c.save(1, state_at(1, width=5000))
        raise KeyError("mine")
    assert "saving checkpoint 1" in caplog.text


# Parameters alone


def test_load_parameters_reads_them_alone_and_changes_nothing(tmp_path, caplog):
    save(tmp_path, 1, 2, 3)
    assert_same_bits(load_parameters(tmp_path, shapes(state_at(0)["params"]))[1], state_at(3)["params"])
    half(array_file(tmp_path / "3"))
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()  # a run may be saving at this moment
    before = names(tmp_path)
    step, params = load_parameters(tmp_path, state_at(0)["params"])
    assert step == 2
    assert_same_bits(params, state_at(2)["params"])
    assert "checkpoint 3 cannot be read" in caplog.text
    assert names(tmp_path) == before
    assert_same_bits(load_parameters(tmp_path, state_at(0)["params"], step=1)[1], state_at(1)["params"])


def test_load_parameters_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of checkpoints .*nowhere"):
        load_parameters(tmp_path / "nowhere", {})
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_parameters(tmp_path, {})
    save(tmp_path, 1, 2)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 7 .*\[1, 2\]"):
        load_parameters(tmp_path, state_at(0)["params"], step=7)
    with pytest.raises(CheckpointMismatchError, match=r"params/embed: float32\[64, 32\] .* float32\[9, 32\]"):
        load_parameters(tmp_path, state_at(0, width=9)["params"])
    with pytest.raises(CheckpointMismatchError, match="weights/embed: absent"):
        load_parameters(tmp_path, state_at(0)["params"], key="weights")
