"""A Flax model as a pure function of a flat dictionary of parameters."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Parameters = dict[str, jax.Array]
"""Parameters by path, such as {"blocks/0/mixer/project/kernel": array}."""


def split_model(model: nnx.Module) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Split a model into a pure function and its parameters.

    Args:
        model: any NNX module whose whole state is parameters. For an abstract one (`nnx.eval_shape`) the returned
            parameters are shapes.

    Returns:
        (apply, parameters). `parameters` is a flat dictionary, {path: array}. `apply(parameters, *args, **kwargs)` is
        `model(*args, **kwargs)` with these parameters; `apply(..., method="features")` calls that method instead.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> apply, parameters = split_model(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> {name: x.shape for name, x in parameters.items()}
        {'bias': (2,), 'kernel': (3, 2)}
        >>> gradient = jax.grad(lambda p: apply(p, jnp.ones((1, 3))).sum())(parameters)
        >>> gradient["bias"].tolist()
        [1.0, 1.0]
    """
    graph, state = nnx.split(model)
    variables = {"/".join(map(str, path)): (path, x.type) for path, x in nnx.to_flat_state(state)}

    def apply(parameters: Parameters, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        flat = [(path, variable(parameters[name])) for name, (path, variable) in variables.items()]
        return getattr(nnx.merge(graph, nnx.from_flat_state(flat)), method)(*args, **kwargs)

    return apply, {"/".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(state)}
