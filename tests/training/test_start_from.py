"""A new run that starts from the parameters of another one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osdn_jax.nn import split_model
from osdn_jax.training import (
    CheckpointMismatchError,
    Checkpoints,
    ConfigError,
    build_data,
    build_model,
    fingerprints,
    load_parameters,
    loop,
    train,
)
from osdn_jax.training.initial_state import build_start
from osdn_jax.training.mesh import Layout, build_mesh
from osdn_jax.training.starting_point import RunOrigin
from support.runs import assert_same_run, compiled_steps, finished, rows, text, tiny_config, write_text

pytestmark = pytest.mark.slow


def parameters(workdir, **options):
    target = split_model(nnx.eval_shape(lambda: build_model(tiny_config(text()))))[1]
    return load_parameters(workdir / "checkpoints", target, **options)[1]


def longer(**changes):
    """A new schedule, with a learning rate so small that a step moves no parameter noticeably."""
    return tiny_config(text(), steps=60, optimizer__learning_rate=1e-30, **changes)


def test_it_starts_from_the_parameters_with_a_new_schedule_and_may_be_resumed(tmp_path, capsys, caplog):
    origin = finished()[0]
    config = longer()
    with jax.log_compiles():
        train(config, tmp_path / "new", start_from=origin, stop_at=2)
    assert compiled_steps(caplog) == 1  # not again for the second step
    assert f"starting from the parameters of step 40 in {origin}" in capsys.readouterr().out
    before, after = parameters(origin), parameters(tmp_path / "new")
    for name, x in before.items():
        np.testing.assert_allclose(after[name], x, rtol=1e-6, atol=1e-6)
    assert [row["step"] for row in rows(tmp_path / "new") if "train/learning_rate" in row] == [1, 2]
    # Once the run has a checkpoint it continues from that, whatever start_from says.
    assert train(config, tmp_path / "new", start_from=origin, stop_at=3).step == 3
    assert "going on from the checkpoint of step 2 of 60" in capsys.readouterr().out


def test_a_run_killed_before_its_first_checkpoint_starts_in_the_same_way(tmp_path):
    for name in ("a", "b"):
        train(longer(), tmp_path / name, start_from=finished()[0], stop_at=1)
    assert_same_run(tmp_path / "a", tmp_path / "b", 1)


def test_the_moving_average_starts_from_the_parameters_and_is_what_is_taken(tmp_path):
    train(longer(ema=0.5), tmp_path / "new", start_from=finished()[0], stop_at=1)
    average = parameters(tmp_path / "new", key="ema")
    for name, x in parameters(finished()[0]).items():
        np.testing.assert_allclose(average[name], x, rtol=1e-6, atol=1e-6)
        assert jnp.all(jnp.isfinite(x))
    train(longer(), tmp_path / "newer", start_from=tmp_path / "new", stop_at=1)


def test_over_a_mesh_it_starts_from_the_same_parameters(tmp_path):
    config = longer(mesh__fsdp=2)
    layout = Layout(build_mesh(config))
    state = build_start(config, layout)[2]
    origin = RunOrigin.of(finished()[0], build_data(config))
    with Checkpoints(tmp_path) as checkpoints:
        started, step, _ = loop._restored(checkpoints, state, None, tmp_path, origin)
    assert step == 0
    for name, x in parameters(finished()[0]).items():
        np.testing.assert_array_equal(started.params[name], x)
        assert started.params[name].sharding == state.params[name].sharding


def test_what_cannot_be_started_from_is_named_and_nothing_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"^start_from: got .*nowhere.*; it has no config\.json"):
        train(longer(), tmp_path / "new", start_from=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"ema": 0.0}')
    with pytest.raises(ConfigError, match="start_from: got .*empty.*; it has no checkpoints"):
        train(longer(), tmp_path / "new", start_from=tmp_path / "empty")
    assert not (tmp_path / "new").exists()


def test_another_model_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointMismatchError, match="blocks/1/.*: absent in the checkpoint"):
        train(longer(model__layers=2), tmp_path / "new", start_from=finished()[0])


def test_another_tokenizer_is_refused_by_name(tmp_path, monkeypatch):
    origin = finished()[0]  # with its own tokenizer, also if no test before has asked for it
    monkeypatch.setattr(fingerprints, "of_tokenizer", lambda tokenizer: "0" * 40)
    other = write_text(tmp_path / "other.txt", seed=3)  # another text is what fine-tuning is for
    config = longer()
    config.data.path = str(other)
    with pytest.raises(CheckpointMismatchError, match="was trained with another tokenizer"):
        train(config, tmp_path / "new", start_from=origin)
