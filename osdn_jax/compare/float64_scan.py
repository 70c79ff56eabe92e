"""The reference: the token-by-token scan in float64 on the CPU."""

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
    """Compute the outputs of a rule, and with cotangents its gradients, by the float64 scan.

    The gradient of one long scan would hold a state per token, gigabytes at T = 4096. So the sequence is split into
    blocks of about sqrt(T) tokens, each of which starts from the final state of the one before, and each block is run a
    second time for its gradient. It is the same scan, token by token, in the same order: no chunkwise form takes part.

    Args:
        rule: a key of `COMPARED_RULES`.
        arrays: the arguments, of any type; their values are used exactly.
        cotangents: of the outputs, by name.

    Returns:
        Outputs and gradients by name, as NumPy arrays; no gradients without cotangents.

    Raises:
        MemoryError: it needs more memory than is free.
    """
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        if cotangents is None:
            return _numpy(_run(lambda x: _in_blocks(rule, x), wide)), {}
        pulled = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in cotangents.items()}
        outputs, gradients = _run(value_and_gradient(lambda x: _in_blocks(rule, x)), wide, pulled)
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


def _in_blocks(rule: str, arrays: Arrays) -> dict[str, jax.Array]:
    tokens = {name: x for name, x in arrays.items() if has_time(name)}
    fixed = {name: x for name, x in arrays.items() if not has_time(name)}
    length = tokens["q"].shape[1]
    size = max(1, math.isqrt(length))
    whole = length // size * size

    @jax.checkpoint
    def block(state: State, tokens: Arrays) -> tuple[State, jax.Array]:
        outputs, state = call(rule, {**fixed, **tokens}, state, implementation="scan")
        return state, outputs["o"]

    # The first block creates the preconditioner's state from the arguments; the others carry it.
    state, first = block(State(fixed["initial_state"]), {name: x[:, :size] for name, x in tokens.items()})
    middle = {name: _to_blocks(x[:, size:whole], size) for name, x in tokens.items()}
    state, out = jax.lax.scan(block, state, middle)
    blocks = [first, jnp.moveaxis(out, 0, 1).reshape(first.shape[0], whole - size, *first.shape[2:])]
    if whole < length:
        state, last = block(state, {name: x[:, whole:] for name, x in tokens.items()})
        blocks.append(last)
    outputs = {"o": jnp.concatenate(blocks, axis=1), "state": state.recurrent}
    if state.preconditioner is not None:
        outputs["preconditioner"] = state.preconditioner
    return outputs


def _to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, N size, ...] -> [N, B, size, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:]), 1, 0)


def _numpy(tree: dict[str, Any]) -> Arrays:
    return {name: np.asarray(x) for name, x in tree.items()}
