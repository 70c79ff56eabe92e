"""Every rule and a training step lower for TPUs and NVIDIA GPUs, without one: `jax.export` needs no device."""

import jax
import numpy as np
import optax
import pytest

from osdn_jax import compare
from osdn_jax.compare import Shape
from osdn_jax.training import TrainState, make_train_step
from support.models import LENGTH, model_config, parameters_of

PLATFORMS = ["tpu", "cuda"]
SHAPE = Shape(batch=2, length=65, key_heads=2, heads=4, key_dim=8, value_dim=6)


@pytest.mark.parametrize("rule", compare.COMPARED_RULES)
def test_rule_and_its_gradient(rule):
    arrays = compare.draw_inputs(rule, SHAPE, "float32", 0)
    run = compare.program(rule, None)
    cotangents = jax.eval_shape(run, arrays)
    exported = jax.export.export(jax.jit(compare.value_and_gradient(run)), platforms=PLATFORMS)(arrays, cotangents)
    assert exported.platforms == tuple(PLATFORMS)
    assert [x.shape for x in exported.out_avals[-len(arrays) :]] == [x.shape for _, x in sorted(arrays.items())]


@pytest.mark.parametrize("rule", ["os_kda", "transformer"])
def test_training_step(rule):
    apply, parameters = parameters_of(model_config(rule))
    optimizer = optax.adamw(1e-3)
    state = TrainState.create(parameters, optimizer, jax.random.key_data(jax.random.key(0)))
    window = {name: np.zeros((2, LENGTH), np.int32) for name in ("inputs", "targets", "segment_ids")}
    batch = window | {"weights": np.ones((2, LENGTH), np.float32)}
    exported = jax.export.export(make_train_step(apply, optimizer), platforms=PLATFORMS)(state, batch)
    assert exported.platforms == tuple(PLATFORMS)
    assert len(exported.out_avals) == len(jax.tree.leaves(state)) + 6  # metrics
