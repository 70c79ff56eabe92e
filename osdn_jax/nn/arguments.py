"""Checks of modules' arguments, at trace time. Every error names the argument, what came and what was expected."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from osdn_jax.ops import checks


def module(config: Any, kind: type, rngs: Any, layers: Any = 1) -> None:
    """Check the arguments that create a module.

    Args:
        config: expected to be of the type `kind`.
        kind: the class of the module's configuration.
        rngs: expected to be an `nnx.Rngs`.
        layers: expected to be an int of at least 1. Default: 1, for a module without this argument.

    Raises:
        ValueError: layers is below 1.
        TypeError: an argument is of another type.
    """
    if not isinstance(config, kind):
        raise TypeError(f"config: got {type_name(config)}, expected a {kind.__name__}")
    if isinstance(layers, bool) or not isinstance(layers, (int, np.integer)):
        raise TypeError(f"layers: got {layers!r}, expected an int of at least 1")
    if layers < 1:
        raise ValueError(f"layers: got {layers}, expected an int of at least 1")
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs: got {type_name(rngs)}, expected an nnx.Rngs")


def mixer_inputs(x: Any, width: int, state: Any = None, kind: type | None = None) -> jax.Array:
    """Return x [B, T, width] as an array, after a check of the arguments of a mixer's call.

    Args:
        x: expected to be a floating-point array [B, T, width].
        width: of the mixer's configuration.
        state: expected to be of the type `kind`, or None.
        kind: the class of the mixer's state.

    Raises:
        ValueError: x has another shape.
        TypeError: x is not a floating-point array, or the state is of another type.
    """
    x = checks.floating_array("x", x, 3, "[B, T, width]")
    if x.shape[-1] != width:
        raise ValueError(f"x: got shape {x.shape}, expected [B, T, width] with width {width}")
    if state is not None and kind is not None and not isinstance(state, kind):
        expected = f"the {kind.__name__} of an earlier call or None"
        raise TypeError(f"state: got {described(state)}, expected {expected}")
    return x


def type_name(value: Any) -> str:
    """Return the name of a value's type for an error message: "Array" for every JAX array, traced or not."""
    return "Array" if isinstance(value, jax.Array) else type(value).__name__


def described(value: Any) -> str:
    """Return `type_name` with an article."""
    name = type_name(value)
    return f"an {name}" if name == "Array" else f"a {name}"
