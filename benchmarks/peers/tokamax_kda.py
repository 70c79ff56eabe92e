"""Kimi Delta Attention by tokamax and by us, with the gate of the former.

tokamax's chunked form on a CPU, `xla_chunked`, takes raw gates only, and computes log decay = lower bound *
sigmoid(exp(a_log) * gate). Both sides compute that and its gradient. Its layout is [H, B, T, ...], its states are
[B, 1, H, K, V].
"""

import functools
import importlib
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.sides import STATES, Arrays, NoPeer, Side
from osdn_jax import ops
from osdn_jax.compare import Shape, draw_inputs

INSTALL = (
    "python -m venv .venv-peers && .venv-peers/bin/pip install tokamax==0.0.17 && "
    ".venv-peers/bin/python -m benchmarks.peers_cpu"
)
_LOWEST = -5.0  # of the log decay; the least that tokamax takes
MODULE = "tokamax._src.ops.kda.api"  # version 0.0.17 exports it from nowhere else


def arrays(shape: Shape) -> Arrays:
    """Draw the arguments, with raw gates that give decays of about exp(-0.2)."""
    drawn = draw_inputs("kda", shape, "float32", seed=0)
    drawn["gate"] = np.random.default_rng(2).normal(-3, 1, drawn.pop("log_decay").shape).astype(np.float32)
    return drawn


def _rate(heads: int) -> np.ndarray:
    """Return a_log of each head."""
    return np.log(np.linspace(1, 2, heads, dtype=np.float32))


def ours() -> Side:
    def run(gate: jax.Array, initial_state: jax.Array, **rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        rate = jnp.exp(_rate(gate.shape[2]))[None, None, :, None]
        o, state = ops.kda(**rest, log_decay=_LOWEST * jax.nn.sigmoid(rate * gate), initial_state=initial_state)
        return o, state.recurrent

    return Side("osdn-jax", run)


def tokamax() -> Side:
    """Return tokamax's side.

    Raises:
        NoPeer: it is not installed, or has no such function.
    """
    try:
        function = importlib.import_module(MODULE).kimi_delta_attention
        name = f"tokamax {version('tokamax')}"
    except (ImportError, AttributeError) as error:
        raise NoPeer(f"tokamax is left out ({error}). In a separate environment: {INSTALL}") from error
    kda = functools.partial(
        function, use_gate_in_kernel=True, lower_bound=_LOWEST, output_final_state=True, implementation="xla_chunked"
    )

    def run(q: jax.Array, k: jax.Array, v: jax.Array, **rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kda(q, k, v, **rest, a_log=jnp.asarray(_rate(q.shape[0])))

    return Side(name, run, _outward, _inward)


def _outward(name: str, x: np.ndarray) -> np.ndarray:
    return x[:, None] if name in STATES else np.moveaxis(x, 2, 0)


def _inward(name: str, x: np.ndarray) -> np.ndarray:
    return x[:, 0] if name in STATES else np.moveaxis(x, 0, 2)
