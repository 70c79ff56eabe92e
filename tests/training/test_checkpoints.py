"""Checkpoints: bit-exact, atomic, and never silently anything but what was saved."""

import gc
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osdn_jax.training.checkpoints import (
    CheckpointError,
    CheckpointMismatchError,
    Checkpoints,
    load_parameters,
)
from support.checkpoints import array_file, assert_same_bits, half, names, new_iterator, save, shapes, state_at

# Orbax leaves its other writes unfinished when one fails, and Python warns when it collects them. The fixture makes it
# collect them here and not in a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_unawaited_reads():
    yield
    gc.collect()


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
        rest = [next(iterator) for _ in range(5)]  # advances during the save
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
    """Return the names in the folder of the checkpoint being written; None before and after."""
    for entry in folder.glob("*tmp*"):
        return {path.name for path in entry.rglob("*")}
    return None


@pytest.mark.slow
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
        assert restored.step in (complete, complete + 1)  # killed between the rename and its report
        assert restored.warnings == ()
        assert int(restored.state["step"]) == restored.step
        assert (np.asarray(restored.state["w"]) == restored.step + np.arange(1000)[None]).all()
        checkpoints.save(restored.step + 1, target)
    assert names(folder) == sorted(str(step) for step in range(1, restored.step + 2))


# A save that fails


@pytest.fixture
def full_disk():
    """Limit the size of files to 100 kB, for a real error of the operating system in the background thread."""
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
