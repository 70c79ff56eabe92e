"""The initial state of a run, created with its shardings."""

from collections.abc import Callable

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from osdn_jax.nn import CausalLM
from osdn_jax.nn.split import split_model
from osdn_jax.training.build import build_model, build_model_config, build_optimizer, random_state
from osdn_jax.training.mesh import Layout
from osdn_jax.training.step import TrainState


def build_start(
    config: ConfigDict, layout: Layout
) -> tuple[CausalLM, optax.GradientTransformation, TrainState, TrainState | None]:
    """Return (model, optimiser, state, shardings of the state) before the first step.

    Over a mesh the model has shapes in place of arrays, each array of the state is created on its devices, and the
    values are the same as on one device. Raises as `plan_start`.
    """
    model, optimizer, create = plan_start(config, layout)
    return model, optimizer, *create()


def plan_start(
    config: ConfigDict, layout: Layout
) -> tuple[CausalLM, optax.GradientTransformation, Callable[[], tuple[TrainState, TrainState | None]]]:
    """Return (model, optimiser, function that creates the state and its shardings); see `build_start`.

    Only creating the state over a mesh needs the other processes. Raises as `build_model`, `build_optimizer` and
    `shapes_at_start`.
    """
    if layout.mesh is None:
        model = build_model(config)
        optimizer = build_optimizer(config, model)
        _, params = split_model(model)
        return model, optimizer, lambda: (_state(config, optimizer, params), None)
    model, optimizer, shapes = shapes_at_start(config, layout)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return model, optimizer, lambda: (jax.jit(lambda: _create(config, optimizer), out_shardings=shardings)(), shardings)


def shapes_at_start(config: ConfigDict, layout: Layout) -> tuple[CausalLM, optax.GradientTransformation, TrainState]:
    """Return (model, optimiser, state) before the first step over a mesh, with shapes and shardings, not arrays.

    Raises ValueError if the mesh does not divide the vocabulary, and as `build_model` and `build_optimizer`.
    """
    vocabulary = build_model_config(config).vocab_size  # first, for a clear error; it may be the tokenizer's
    layout.check_vocabulary(vocabulary, given=config.model.vocab_size is not None)
    model = nnx.eval_shape(lambda: build_model(config))
    optimizer = build_optimizer(config, model)
    state = jax.eval_shape(lambda: _create(config, optimizer))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return model, optimizer, jax.tree.map(place, state, layout.of_state(state))


def _create(config: ConfigDict, optimizer: optax.GradientTransformation) -> TrainState:
    return _state(config, optimizer, split_model(build_model(config))[1])


def _state(config: ConfigDict, optimizer: optax.GradientTransformation, params: dict[str, jax.Array]) -> TrainState:
    return TrainState.create(params, optimizer, random_state(config), ema=config.ema > 0)
