"""A model as a pure function of a flat dictionary of parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Parameters = dict[str, jax.Array]  # "blocks/0/mixer/project/kernel": array


def split_model(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(apply, parameters) with apply(parameters, *args, **kwargs) = model(*args, **kwargs).

    Of an abstract model (`nnx.eval_shape`) the parameters are shapes.

    apply(..., method="features") calls that method of the model instead.
    """
    graph, state = nnx.split(model)
    places = {"/".join(map(str, path)): (path, x.type) for path, x in nnx.to_flat_state(state)}

    def apply(parameters: Parameters, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        flat = [(path, kind(parameters[name])) for name, (path, kind) in places.items()]
        return getattr(nnx.merge(graph, nnx.from_flat_state(flat)), method)(*args, **kwargs)

    return apply, {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(state)}
