"""The state that a run starts from, where it lies."""

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from osdn_jax.nn import CausalLM
from osdn_jax.nn.functional import functional
from osdn_jax.training.build import build_model, build_optimizer, random_state
from osdn_jax.training.mesh import Layout
from osdn_jax.training.step import TrainState


def build_start(
    config: ConfigDict, layout: Layout
) -> tuple[CausalLM, optax.GradientTransformation, TrainState, TrainState | None]:
    """(model, optimiser, state, shardings of the state) before the first step.

    Over a mesh the model has shapes in place of arrays, every array of the state is made where it lies, and the
    numbers are those of one device. Raises as `build_model` and `build_optimizer`.
    """
    if layout.mesh is None:
        model = build_model(config)
        optimizer = build_optimizer(config, model)
        _, params = functional(model)
        return model, optimizer, _state(config, optimizer, params), None
    model = nnx.eval_shape(lambda: build_model(config))
    optimizer = build_optimizer(config, model)

    def create() -> TrainState:
        return _state(config, optimizer, functional(build_model(config))[1])

    shardings = layout.of_state(jax.eval_shape(create))
    return model, optimizer, jax.jit(create, out_shardings=shardings)(), shardings


def _state(config: ConfigDict, optimizer: optax.GradientTransformation, params: dict[str, jax.Array]) -> TrainState:
    return TrainState.create(params, optimizer, random_state(config), ema=config.ema > 0)
