"""The judge: the token-by-token scan in float64 on the CPU."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from osdn_jax.compare.inputs import Arrays, call, has_time, value_and_gradient
from osdn_jax.compare.machine import available_bytes
from osdn_jax.ops import State


def reference(rule: str, arrays: Arrays, cotangents: Arrays | None = None) -> tuple[Arrays, Arrays]:
    """Outputs and, with cotangents, gradients (else {}) by the float64 scan, as NumPy arrays.

    The gradient of one long scan would hold a memory per token, gigabytes at T = 4096. So the sequence is cut into
    pieces of about sqrt(T) tokens, each of which goes on from the state that the last one left, and each piece is run
    again for its gradient. That is the same scan, token by token, in the same order: no chunkwise form judges here.

    Args:
        rule: one of COMPARED_RULES.
        arrays: the arguments, of any type: they are taken as the exact numbers that they are.
        cotangents: of the outputs, by name.

    Raises:
        MemoryError: it needs more memory than is free.
    """
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        if cotangents is None:
            return _numpy(_run(lambda x: _in_pieces(rule, x), wide)), {}
        pulled = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in cotangents.items()}
        outputs, gradients = _run(value_and_gradient(lambda x: _in_pieces(rule, x)), wide, pulled)
        return _numpy(outputs), _numpy(gradients)


def _run(function: Callable[..., Any], *arguments: Arrays) -> Any:
    compiled = jax.jit(function).lower(*arguments).compile()
    memory, available = compiled.memory_analysis(), available_bytes()
    if memory is not None and available is not None:
        needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
        if needed > 0.9 * available:
            raise MemoryError(
                f"the float64 scan to compare with needs {needed / 1e9:.1f} GB of memory where "
                f"{available / 1e9:.1f} GB are free"
            )
    return compiled(*arguments)


def _in_pieces(rule: str, arrays: Arrays) -> dict[str, jax.Array]:
    tokens = {name: x for name, x in arrays.items() if has_time(name)}
    fixed = {name: x for name, x in arrays.items() if not has_time(name)}
    length = tokens["q"].shape[1]
    size = max(1, math.isqrt(length))
    whole = length // size * size

    @jax.checkpoint
    def piece(state: State, tokens: Arrays) -> tuple[State, jax.Array]:
        outputs, state = call(rule, {**fixed, **tokens}, state, implementation="scan")
        return state, outputs["o"]

    # The first piece makes the preconditioner's state from the arguments; the others carry it.
    state, first = piece(State(fixed["initial_state"]), {name: x[:, :size] for name, x in tokens.items()})
    middle = {name: _to_pieces(x[:, size:whole], size) for name, x in tokens.items()}
    state, out = jax.lax.scan(piece, state, middle)
    parts = [first, jnp.moveaxis(out, 0, 1).reshape(first.shape[0], whole - size, *first.shape[2:])]
    if whole < length:
        state, last = piece(state, {name: x[:, whole:] for name, x in tokens.items()})
        parts.append(last)
    outputs = {"o": jnp.concatenate(parts, axis=1), "memory": state.memory}
    if state.preconditioner is not None:
        outputs["preconditioner"] = state.preconditioner
    return outputs


def _to_pieces(x: jax.Array, size: int) -> jax.Array:
    """[B, N size, ...] -> [N, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:]), 1, 0)


def _numpy(tree: dict[str, Any]) -> Arrays:
    return {name: np.asarray(x) for name, x in tree.items()}
