"""The compiled trainer: equal to the training step at every rate, and no program for a new seed or rate."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from osdn_jax.data.recall import IGNORE, TASKS, parse_task
from osdn_jax.nn import split_model
from osdn_jax.sweep import Trainer, check_config
from osdn_jax.training import TrainState, build_model, build_optimizer, build_step_config, make_train_step
from osdn_jax.training.build import random_state
from osdn_jax.training.tasks import with_task


@pytest.fixture
def compiled():
    """A list to which every compilation is added."""
    events = []

    def listen(name, seconds, **_):
        if "backend_compile" in name:
            events.append(name)

    monitoring.register_event_duration_secs_listener(listen)
    yield events
    monitoring.unregister_event_duration_listener(listen)


def by_hand(config, seed, rate):
    """Train with the functions of `train`, one step at a time, with losses of all tokens; return the curve's parts."""
    config = copy.deepcopy(config)
    config.seed, config.optimizer.learning_rate = seed, rate
    config = with_task(config)
    model = build_model(config)
    apply, params = split_model(model)
    optimizer = build_optimizer(config, model)
    step = make_train_step(apply, optimizer, build_step_config(config))
    state = TrainState.create(params, optimizer, random_state(config))
    task, every = parse_task(config.data.task), config.validation.every
    test = task.generate(config.data.validation_examples, part=1)
    accuracy, losses = [], []
    predict = jax.jit(lambda params, tokens: jnp.argmax(apply(params, tokens)[0], axis=-1))

    def evaluate():
        asked = test.targets != IGNORE
        right = (np.asarray(predict(state.params, jnp.asarray(test.tokens))) == test.targets) & asked
        accuracy.append(float(np.mean(right.sum(axis=1) / asked.sum(axis=1))))

    evaluate()
    for first in range(0, config.steps, every):
        part = (task.seed, 2, seed, first)
        tokens, targets = TASKS["mqar"](every * config.batch_size, **task.options, seed=part)
        asked = (targets != IGNORE).astype(np.float32)
        for i in range(every):
            rows = slice(i * config.batch_size, (i + 1) * config.batch_size)
            batch = {
                "inputs": tokens[rows],
                "targets": np.maximum(targets[rows], 0),
                "segment_ids": np.zeros_like(tokens[rows]),
                "weights": asked[rows],
            }
            state, metrics = step(state, {k: jnp.asarray(v) for k, v in batch.items()})
            losses.append(float(metrics["loss"]))
        evaluate()
    return accuracy, np.mean(np.reshape(losses, (-1, every)), axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_another_seed_and_rate_equal_the_training_step_and_compile_nothing(tiny, name, compiled):
    tiny.optimizer.name = name
    tiny.model.dropout = 0.1
    trainer = Trainer(tiny)
    trainer.train([0], 1e-3)
    assert len(compiled) >= 3
    compiled.clear()
    seed, rate = 2**31 + 5, 3e-2
    [curve] = trainer.train([seed], rate)
    assert compiled == []
    accuracy, losses = by_hand(tiny, seed, rate)
    assert curve.steps == [0, 3, 6]
    np.testing.assert_allclose(curve.accuracy, accuracy, atol=1e-6)
    np.testing.assert_allclose(curve.train_loss[1:], losses, rtol=2e-5)


@pytest.mark.slow
def test_vmap_equals_single_runs(tiny):
    seeds = [0, 1, 7]
    together = Trainer(tiny, members=3).train(seeds, 1e-2)
    trainer = Trainer(tiny)
    for seed, curve in zip(seeds, together, strict=True):
        [alone] = trainer.train([seed], 1e-2)
        np.testing.assert_allclose(curve.test_loss, alone.test_loss, rtol=2e-5)
        np.testing.assert_allclose(curve.train_loss[1:], alone.train_loss[1:], rtol=2e-5)
        assert curve.accuracy == pytest.approx(alone.accuracy, abs=1e-6)


@pytest.mark.slow
def test_a_task_that_asks_unequally_often_needs_one_program_too(tiny, compiled):
    tiny.data.task = "in_context_recall:length=16,vocabulary=8"
    trainer = Trainer(tiny)
    trainer.train([0], 1e-3)
    compiled.clear()
    [curve] = trainer.train([1], 1e-2)
    assert compiled == []
    assert np.isfinite(curve.test_loss).all()


@pytest.mark.slow
def test_a_run_that_diverges_ends_early(tiny):
    tiny.max_skipped_steps = 1
    tiny.optimizer.clip_norm = float("inf")
    [curve] = Trainer(tiny).train([0], 1e30)
    assert curve.diverged
    assert curve.skipped > 1
    assert curve.steps[-1] < tiny.steps or curve.steps == [0, 3, 6]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_can_be_saved(tiny, monkeypatch):
    monkeypatch.setattr(Trainer, "_tested", lambda *_: (np.zeros(1), np.array([np.inf])))
    [curve] = Trainer(tiny).train([0], 1e-3)
    assert curve.test_loss == [None] * len(curve.steps)
    json.dumps(curve._asdict(), allow_nan=False)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("data.task", None, "data.task: got None, expected a recall task"),
        ("data.task", "mqar:length=16", "without pairs"),
        ("steps", 7, r"steps: got 7, expected a multiple of validation.every = 3"),
        ("mesh.data", 2, "mesh.data: got 2, expected 1"),
        ("model.rule", "ozdn", "ozdn"),
        ("optimizer.name", "sgd", "optimizer.name: got 'sgd'"),
        ("optimizer.warmup_steps", 6, "optimizer.warmup_steps"),
        ("accumulate", 3, "accumulate: got 3"),
    ],
)
def test_a_configuration_that_cannot_be_trained(tiny, key, value, said):
    with tiny.ignore_type():
        tiny.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=said):
        check_config(tiny)
