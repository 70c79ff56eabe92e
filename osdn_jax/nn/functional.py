"""A model as a pure function of a flat dictionary of parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from osdn_jax.nn.layers import Exempt

Parameters = dict[str, jax.Array]  # "blocks/0/mixer/project/kernel": array


def functional(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
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


# Projections to the gates of the recurrences and preconditioners, by their place in a block.
_GATES = {"beta", "decay", "erase_gate", "write_gate", "gram_decay", "gram_gain"}


def block_matrices(model: nnx.Module) -> dict[str, bool]:
    """Which parameters are the weight matrices of the blocks: not embeddings, head, gates, or what is `Exempt`."""
    return {
        name: decayed and name.startswith("blocks/") and _GATES.isdisjoint(name.split("/"))
        for name, decayed in decays(model).items()
    }


def decays(model: nnx.Module) -> dict[str, bool]:
    """Which parameters weight decay acts on: matrices, unless a layer has marked them `Exempt`."""
    return {
        "/".join(map(str, path)): x.get_value().ndim >= 2 and not issubclass(x.type, Exempt)
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
