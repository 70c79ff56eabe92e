"""A model as a pure function of a flat dictionary of parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from osdn_jax.nn.layers import Exempt

Parameters = dict[str, jax.Array]  # "blocks/0/mixer/project/kernel": array


def functional(model: nnx.Module) -> tuple[Callable[..., Any], Parameters]:
    """(apply, parameters) with apply(parameters, *args, **kwargs) = model(*args, **kwargs)."""
    graph, state = nnx.split(model)
    paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(state)}

    def apply(parameters: Parameters, *args: Any, **kwargs: Any) -> Any:
        flat = [(path, nnx.Param(parameters[name])) for name, path in paths.items()]
        return nnx.merge(graph, nnx.from_flat_state(flat))(*args, **kwargs)

    return apply, {"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(state)}


def decays(model: nnx.Module) -> dict[str, bool]:
    """Which parameters weight decay acts on: matrices, unless a layer has marked them `Exempt`."""
    return {
        "/".join(map(str, path)): x.get_value().ndim >= 2 and not issubclass(x.type, Exempt)
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
