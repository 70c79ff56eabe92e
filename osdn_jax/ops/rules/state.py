"""The state that a named rule returns and continues from."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from osdn_jax.ops import checks


class State(NamedTuple):
    """The state of a named rule after the tokens of a call; a pytree.

    Rules with a preconditioner return a subclass, so that the state of another rule is refused. A State that you create
    yourself, `State(recurrent, preconditioner)`, is accepted by every rule and comes back as a plain State.

    `lax.scan` requires a carry that keeps its structure, so start it with the State that a call returned, or with one
    that holds everything the rule returns. An array is accepted as initial_state, but a State comes back.

    Attributes:
        recurrent: S, [B, H, K, V] float32 (float64 for float64 inputs).
        preconditioner: d of the hypergradient preconditioner [B, P, K], A of the Gram preconditioner [B, Hk, K], the
            sum or average of squared keys [B, Hk, K], or the matrix of the exact Gram preconditioner [B, Hk, K, K];
            None for rules without a preconditioner.

    Example:
        >>> import jax.numpy as jnp
        >>> from osdn_jax import ops
        >>> q = k = v = jnp.ones((1, 6, 1, 2))
        >>> beta = jnp.full((1, 6, 1), 0.3)
        >>> whole, _ = ops.delta_net(q, k, v, beta=beta)
        >>> first, state = ops.delta_net(q[:, :4], k[:, :4], v[:, :4], beta=beta[:, :4])
        >>> rest, _ = ops.delta_net(q[:, 4:], k[:, 4:], v[:, 4:], beta=beta[:, 4:], initial_state=state)
        >>> bool(jnp.allclose(jnp.concatenate([first, rest], axis=1), whole))
        True
    """

    recurrent: Float[Array, "B H K V"]
    preconditioner: Float[Array, "B P ..."] | None = None


class HypergradientState(State):
    """The state of osdn, os_gdn and os_kda: its preconditioner is d."""

    __slots__ = ()


class GramState(State):
    """The state of pdn, pgdn and pkda: its preconditioner is the running sum A."""

    __slots__ = ()


class SquaresState(State):
    """The state of the delta rule with a preconditioner of squared keys, which is their sum or average."""

    __slots__ = ()


class ExactGramState(State):
    """The state of exact_pdn: its preconditioner is the matrix P."""

    __slots__ = ()


InitialState = State | Float[Array, "B H K V"] | None  # of every named rule


def check_state(
    initial_state: Any, state_class: type[State] = State, shape: tuple[int, ...] | None = None, layout: str = ""
) -> tuple[State | None, type[State]]:
    """Check the initial state of a rule.

    Args:
        initial_state: a State of this rule, one created by hand, an array of the recurrent state alone, or None.
        state_class: class of the rule's state.
        shape: shape of the preconditioner; None for rules without one.
        layout: names of its axes, for error messages.

    Returns:
        (the state or None, the class of the state to return: that of initial_state, since the carry of `lax.scan` must
        keep its type).

    Raises:
        TypeError: initial_state is of another type.
        ValueError: it is the state of another rule, or its preconditioner has another shape.
    """
    if initial_state is None:
        return None, state_class
    if isinstance(initial_state, (jax.Array, np.ndarray)):
        return State(initial_state), state_class  # type: ignore[arg-type]  # NumPy arrays are accepted, too
    if not isinstance(initial_state, State):
        got = type(initial_state).__name__
        raise TypeError(f"initial_state: got {got}, expected an ops.State, an array [B, H, K, V] or None")
    if type(initial_state) not in (State, state_class):
        got = type(initial_state).__name__
        expected = f"a {state_class.__name__}" if shape else "the state of a rule without a preconditioner"
        raise ValueError(f"initial_state: got the {got} of another rule, expected {expected}")
    if initial_state.preconditioner is not None:
        if shape is None:
            raise ValueError("initial_state: got a preconditioner, expected the state of a rule without one")
        name = "initial_state.preconditioner"
        checked = checks.shaped_array(name, initial_state.preconditioner, shape, layout)
        return initial_state._replace(preconditioner=checked), type(initial_state)
    return initial_state, type(initial_state)
