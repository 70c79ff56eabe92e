"""A model as the functions that the programs of a generation call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from osdn_jax._errors import first_line
from osdn_jax.generation.programs import Functions
from osdn_jax.nn.sharding import refuse_mesh


def of_language_model(apply: Callable[..., Any]) -> Functions:
    """Return the functions of a `CausalLM` that `nn.split_model` has split.

    Logits exist for the last token only, and a prompt is read without any.
    """

    def start(parameters: Any, rows: int) -> Any:
        return apply(parameters, rows, method="start_states")

    def restart(parameters: Any, states: Any, rows: jax.Array) -> Any:
        return apply(parameters, states, rows, method="restart")

    def read(parameters: Any, tokens: jax.Array, states: Any, segment_ids: jax.Array | None) -> Any:
        return apply(parameters, tokens, states, segment_ids, method="features")[1]

    def step(parameters: Any, token: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        hidden, states = apply(parameters, token[:, None], states, method="features")
        return last_logits(apply, parameters, hidden), states

    return Functions(start, restart, read, step)


def of_logits(apply: Callable[..., Any]) -> Functions:
    """Return the functions of a model (parameters, tokens [B, T], states) -> (logits [B, T, vocabulary], states).

    It reads texts without padding only.
    """

    def start(parameters: Any, rows: int) -> Any:
        return apply(parameters, jnp.zeros((rows, 0), jnp.int32), None)[1]

    def restart(parameters: Any, states: Any, rows: jax.Array) -> Any:
        raise NotImplementedError  # only padding needs it

    def read(parameters: Any, tokens: jax.Array, states: Any, segment_ids: jax.Array | None) -> Any:
        return apply(parameters, tokens, states)[1]

    def step(parameters: Any, token: jax.Array, states: Any) -> tuple[jax.Array, Any]:
        logits, states = apply(parameters, token[:, None], states)
        return logits[:, -1], states

    return Functions(start, restart, read, step)


def last_logits(apply: Callable[..., Any], parameters: Any, hidden: Float[Array, "B T D"]) -> Float[Array, "B Vocab"]:
    """Return the logits after the last token, in float32, from the model's features."""
    unembedding = apply(parameters, method="unembedding").astype(hidden.dtype)
    wide = jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
    return jnp.matmul(hidden[:, -1], unembedding.T, preferred_element_type=wide)


def vocabulary_of_language_model(apply: Callable[..., Any], parameters: Any) -> int:
    """Return the number of logits of a `CausalLM`, from its shapes.

    Raises:
        ValueError: a call under `jax.set_mesh` of a mesh that models run on.
        TypeError: apply and parameters are no `CausalLM`.
    """
    refuse_mesh()
    expected = "expected (apply, parameters) of nn.split_model of an nn.CausalLM"
    try:
        found = jax.eval_shape(lambda parameters: apply(parameters, method="unembedding"), parameters)
    except Exception as error:  # whatever a function of someone else raises
        raise TypeError(f"model: got a pair without an unembedding, {expected}: {first_line(error)}") from error
    if len(getattr(found, "shape", ())) != 2:
        raise TypeError(f"model: got a pair whose unembedding is no matrix, {expected}")
    return int(found.shape[0])


def vocabulary_of(functions: Functions, parameters: Any) -> int:
    """Return the number of logits of a model, from its shapes."""
    refuse_mesh()

    def logits(parameters: Any) -> jax.Array:
        return functions.step(parameters, jnp.zeros((1,), jnp.int32), functions.start(parameters, 1))[0]

    return int(jax.eval_shape(logits, parameters).shape[-1])
