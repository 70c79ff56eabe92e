"""Checks of modules' arguments, at trace time. Every error names the argument, what came and what was expected."""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from osdn_jax.ops import State, checks


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
    count("layers", layers, 1)
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs: got {type_name(rngs)}, expected an nnx.Rngs")


def count(name: str, value: Any, least: int) -> int:
    """Return an int. Raises TypeError for another type, and ValueError unless it is from `least` to 2^31 - 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: got {shown(value)}, expected an int of at least {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected an int of at least {least}")
    if value >= 2**31:
        raise ValueError(f"{name}: got {value}, expected an int below 2**31")
    return int(value)


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
    if state is not None and kind is not None:
        mixer_state("state", state, kind)
    return x


# Axes of the arrays of mixers' states. Their sizes, which depend on the configuration, are checked by the mixers.
_AXES = {
    "window": "[B, conv_size - 1, channels]",
    "keys": "[B, Hk, S, K]",
    "values": "[B, Hk, S, V]",
    "latents": "[B, S, R + shared_key_dim]",
    "position": "[]",
    "start": "[B]",
    "recurrent": "[B, H, K, V]",
    "preconditioner": None,  # of 3 or 4 axes, which depends on the rule
}
_POSITIONS = ("position", "start")


def mixer_state(name: str, state: Any, kind: type) -> None:
    """Check the type of a mixer's state, and the types and numbers of axes of its arrays.

    Args:
        name: of the state, for error messages.
        state: expected to be of the type `kind`.
        kind: the class of the mixer's state, a NamedTuple.

    Raises:
        ValueError: an array has another number of axes.
        TypeError: the state, or a field of it, is of another type.
    """
    if not isinstance(state, kind):
        raise TypeError(f"{name}: got {described(state)}, expected the {kind.__name__} of an earlier call")
    for field, x in state._asdict().items():  # type: ignore[attr-defined]  # of a NamedTuple
        if field == "rule":
            if not isinstance(x, State):
                raise TypeError(f"{name}.rule: got {described(x)}, expected an ops.State")
            _state_array(f"{name}.rule", "recurrent", x.recurrent)
            if x.preconditioner is not None:
                _state_array(f"{name}.rule", "preconditioner", x.preconditioner)
        else:
            _state_array(name, field, x)


def _state_array(name: str, field: str, x: Any) -> None:
    axes, integers = _AXES[field], field in _POSITIONS
    layout, numbers = axes or "[B, ...]", "integer" if integers else "floating-point"
    if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"{name}.{field}: got {described(x)}, expected an array {layout}")
    if not jnp.issubdtype(x.dtype, jnp.integer if integers else jnp.floating):
        raise TypeError(f"{name}.{field}: got dtype {x.dtype}, expected {numbers} {layout}")
    if axes is not None and x.ndim != len([axis for axis in axes[1:-1].split(",") if axis]):
        raise ValueError(f"{name}.{field}: got shape {x.shape}, expected {layout}")


def like_start(name: str, state: Any, start: Any) -> None:
    """Raise ValueError unless the arrays of a mixer's state have the shapes of those at the start of a sequence."""
    got, wanted = (
        {f"{name}{jax.tree_util.keystr(path)}": jnp.shape(x) for path, x in jax.tree.leaves_with_path(tree)}
        for tree in (state, start)
    )
    for field in sorted(got.keys() | wanted.keys()):
        if got.get(field) != wanted.get(field):
            came = f"shape {got[field]}" if field in got else "None"
            expected = f"shape {wanted[field]}" if field in wanted else "None"
            raise ValueError(f"{field}: got {came}, expected {expected}; the state is of another batch or model")


def shown(value: Any) -> str:
    """Return a value for an error message, in one line that is not long."""
    return " ".join(reprlib.repr(value).split())


def type_name(value: Any) -> str:
    """Return the name of a value's type for an error message: "Array" for every JAX array, traced or not."""
    return "Array" if isinstance(value, jax.Array) else type(value).__name__


def described(value: Any) -> str:
    """Return `type_name` with an article."""
    name = type_name(value)
    return f"an {name}" if name[0] in "AEIO" else f"a {name}"
