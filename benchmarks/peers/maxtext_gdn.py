"""Gated DeltaNet by MaxText and by us.

MaxText is on no package index, and its module imports all of it. So the source of the one function is read out of a
checkout and compiled by itself.
"""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.peers.sides import Arrays, NoPeer, Side
from osdn_jax import ops
from osdn_jax.compare import Shape, draw_inputs

FILE = "src/maxtext/models/qwen3.py"
FUNCTION = "jax_chunk_gated_delta_rule"
INSTALL = "git clone --depth 1 https://github.com/AI-Hypercomputer/maxtext, then --maxtext maxtext"


def arrays(shape: Shape) -> Arrays:
    """Draw the arguments of Gated DeltaNet."""
    return draw_inputs("gated_delta_net", shape, "float32", seed=0)


def ours() -> Side:
    def run(initial_state: jax.Array, **rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        o, state = ops.gated_delta_net(**rest, initial_state=initial_state)
        return o, state.recurrent

    return Side("osdn-jax", run)


def maxtext(checkout: Path | None) -> Side:
    """Return MaxText's side, from the folder of a checkout.

    Raises:
        NoPeer: no folder is given, or the function is not there.
    """
    if checkout is None:
        raise NoPeer(f"MaxText is left out. To measure it: {INSTALL}")
    try:
        module = ast.parse((checkout / FILE).read_text())
    except (OSError, SyntaxError) as error:
        raise NoPeer(f"MaxText is left out ({error}). To measure it: {INSTALL}") from error
    found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == FUNCTION]
    if not found:
        raise NoPeer(f"MaxText is left out: {checkout / FILE} has no function {FUNCTION}")
    scope = {"jax": jax, "jnp": jnp, "lax": lax, "Array": jax.Array}
    exec(compile(ast.Module(found, []), str(checkout / FILE), "exec"), scope)

    def run(
        q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, beta: jax.Array, initial_state: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return scope[FUNCTION](q, k, v, log_decay, beta, initial_state=initial_state, compute_dtype=jnp.float32)

    return Side("MaxText", run)
